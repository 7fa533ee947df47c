"""N copies of one MjModel on one device, stepped by MuJoCo Warp. Physics only: no tasks, no images.

State is shared with torch without a copy: write `qpos`, `ctrl`, ... in place, read `xpos`, `site_xpos`, ... afterwards.
On a CUDA device one control step is one CUDA graph, launched on torch's current stream, so that torch's work before and
after it needs no synchronisation. On Warp's CPU device the same kernels run one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import mujoco_warp as mjw
import torch
import warp as wp

wp.config.quiet = True

_VIEWS = (
    "qpos", "qvel", "qacc_warmstart", "ctrl", "mocap_pos", "mocap_quat", "xfrc_applied",
    "xpos", "xquat", "site_xpos", "site_xmat", "xanchor", "xaxis",
)  # fmt: skip


@dataclass(frozen=True)
class Buffers:
    """Room for contacts and constraints. MuJoCo Warp drops what does not fit: see `WarpSim.overflow`."""

    nconmax: int = 64
    """Contacts per world, on average over the worlds (one pool for all; candidate pairs count too)."""
    njmax: int = 256
    """Constraint rows per world."""


@wp.kernel(enable_backward=False)
def _measure(
    nefc: wp.array[int],
    nacon: wp.array[int],
    ncollision: wp.array[int],
    rows: wp.array[int],
    contacts: wp.array[int],
) -> None:
    """Peaks of the counters, which every physics step overwrites."""
    world = wp.tid()
    rows[world] = wp.max(rows[world], nefc[world])
    if world == 0:
        contacts[0] = wp.max(contacts[0], wp.max(nacon[0], ncollision[0]))


@wp.kernel(enable_backward=False)
def _settle(
    live: wp.array[bool],
    saved_qpos: wp.array2d[float],
    saved_qvel: wp.array2d[float],
    saved_warmstart: wp.array2d[float],
    start_qpos: wp.array2d[float],
    qpos: wp.array2d[float],
    qvel: wp.array2d[float],
    warmstart: wp.array2d[float],
    diverged: wp.array[bool],
) -> None:
    """Worlds that are over stand still; a live one whose state is not finite goes back to its episode's start."""
    world = wp.tid()
    if live[world]:
        broken = wp.int32(0)
        for i in range(qpos.shape[1]):
            if not wp.isfinite(qpos[world, i]):
                broken += 1
        for i in range(qvel.shape[1]):
            if not wp.isfinite(qvel[world, i]):
                broken += 1
        if broken > 0:
            diverged[world] = True
            for i in range(qpos.shape[1]):
                qpos[world, i] = start_qpos[world, i]
            for i in range(qvel.shape[1]):
                qvel[world, i] = 0.0
                warmstart[world, i] = 0.0
    else:
        for i in range(qpos.shape[1]):
            qpos[world, i] = saved_qpos[world, i]
        for i in range(qvel.shape[1]):
            qvel[world, i] = saved_qvel[world, i]
            warmstart[world, i] = saved_warmstart[world, i]


class Program:
    """A fixed sequence of Warp launches: a CUDA graph on a CUDA device, the launches themselves elsewhere."""

    def __init__(self, launches: Callable[[], None], device: wp.context.Device) -> None:
        self._launches, self._device, self._graph = launches, device, None
        with wp.ScopedDevice(device):
            launches()  # compiles and loads every kernel, which no capture may do
            if device.is_cuda:
                wp.synchronize_device(device)
                collecting = gc.isenabled()
                gc.disable()  # freeing an array inside a capture would invalidate it
                try:
                    # On Warp's own stream: the default stream of torch cannot be captured.
                    with wp.ScopedCapture(device=device) as capture:
                        launches()
                finally:
                    if collecting:
                        gc.enable()
                self._graph = capture.graph
                wp.synchronize_device(device)

    def __call__(self) -> None:
        """Run after all work on torch's current stream and before the next work on it."""
        if self._graph is None:
            self.launch()
        else:
            stream = wp.stream_from_torch(torch.cuda.current_stream(wp.device_to_torch(self._device)))
            wp.capture_launch(self._graph, stream=stream)

    def launch(self) -> None:
        """The same without the graph, on Warp's own stream: for machines without graphs, and to check them."""
        with wp.ScopedDevice(self._device):
            self._launches()


class WarpSim:
    """`num_worlds` worlds of `model`, `substeps` physics steps per control step, on `device` ("cpu", "cuda:1", ...)."""

    def __init__(
        self, model: mujoco.MjModel, num_worlds: int, substeps: int, *, device: str, buffers: Buffers | None = None
    ) -> None:
        self.num_worlds, self.substeps, self.buffers = num_worlds, substeps, buffers or Buffers()
        self.warp_device = wp.get_device(device)
        self.device = torch.device(wp.device_to_torch(self.warp_device))
        with wp.ScopedDevice(self.warp_device):
            self.model = mjw.put_model(model)
            self.data = mjw.make_data(model, nworld=num_worlds, nconmax=self.buffers.nconmax, njmax=self.buffers.njmax)
            self._saved = [wp.zeros_like(array) for array in self._state()]
            self._start_qpos = wp.clone(self.data.qpos)
            self._live = wp.ones(num_worlds, dtype=bool)
            self._diverged = wp.zeros(num_worlds, dtype=bool)
            self._peak_rows = wp.zeros(num_worlds, dtype=int)
            self._peak_contacts = wp.zeros(1, dtype=int)
            self._stale = [wp.zeros_like(self.data.xanchor), wp.zeros_like(self.data.xaxis)]
        for name in _VIEWS:
            setattr(self, name, wp.to_torch(getattr(self.data, name)))
        self.start_qpos, self.live = wp.to_torch(self._start_qpos), wp.to_torch(self._live)
        self.diverged, self.peak_rows = wp.to_torch(self._diverged), wp.to_torch(self._peak_rows)
        self.peak_contacts = wp.to_torch(self._peak_contacts)
        self.stale_xanchor, self.stale_xaxis = map(wp.to_torch, self._stale)
        """Joint anchors and axes at the start of the last physics step: what `mj_jacSite` on the CPU backend uses."""
        self.kinematics = Program(lambda: mjw.kinematics(self.model, self.data), self.warp_device)
        self.step = Program(self._launch_step, self.warp_device)
        """One control step of every world in `live`; the others keep their state. Poses are current afterwards."""

    def _state(self) -> list[wp.array]:
        return [self.data.qpos, self.data.qvel, self.data.qacc_warmstart]

    def _launch_step(self) -> None:
        data, state = self.data, self._state()
        for saved, array in zip(self._saved, state, strict=True):
            wp.copy(saved, array)
        for _ in range(self.substeps):
            mjw.step(self.model, data)
            wp.launch(
                _measure,
                dim=self.num_worlds,
                inputs=[data.nefc, data.nacon, data.ncollision],
                outputs=[self._peak_rows, self._peak_contacts],
            )
        for stale, array in zip(self._stale, (data.xanchor, data.xaxis), strict=True):
            wp.copy(stale, array)
        wp.launch(
            _settle,
            dim=self.num_worlds,
            inputs=[self._live, *self._saved, self._start_qpos],
            outputs=[*state, self._diverged],
        )
        mjw.kinematics(self.model, data)

    def place(
        self,
        ids: torch.Tensor,
        *,
        qpos: torch.Tensor,
        ctrl: torch.Tensor,
        mocap_pos: torch.Tensor,
        mocap_quat: torch.Tensor,
        lift_force: torch.Tensor,
    ) -> None:
        """Put worlds `ids` at rest at `qpos` (one row each); all others stay exactly as they are."""
        self.qpos[ids] = self.start_qpos[ids] = qpos
        self.ctrl[ids] = ctrl
        self.qvel[ids] = self.qacc_warmstart[ids] = 0.0
        self.mocap_pos[ids], self.mocap_quat[ids] = mocap_pos, mocap_quat
        self.xfrc_applied[ids, :, 2] = lift_force
        self.kinematics()
        self.stale_xanchor[ids], self.stale_xaxis[ids] = self.xanchor[ids], self.xaxis[ids]

    def overflow(self) -> tuple[torch.Tensor, int, int]:
        """((N,) worlds that lost contacts or constraints, contacts needed per world, rows needed) since the last call.

        Contacts share one pool: when it is too small, any world may have lost some, so all are marked.
        """
        contacts, rows = int(self.peak_contacts[0]), int(self.peak_rows.max())
        room = self.data.naconmax
        lost = self.peak_rows > self.data.njmax
        if contacts > room:
            lost = torch.ones_like(lost)
        self.peak_contacts.zero_()
        self.peak_rows.zero_()
        return lost, -(-contacts // self.num_worlds), rows
