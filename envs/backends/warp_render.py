"""Ray-traced images of N Warp worlds: colour and depth of every camera, straight into arrays that torch shares.

MuJoCo Warp's own shading ignores the headlight and the lights' colours: a policy trained on one renderer would see
another world in the other. So only its ray caster is used and shading is done here as OpenGL does it for the CPU
backend: ambient plus diffuse of a headlight along the camera's axis and of every light (Phong 1975 without specular; no
shadows, no anti-aliasing).
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import mujoco_warp as mjw
import numpy as np
import torch
import warp as wp
from mujoco_warp._src.render import cast_ray  # not public: the version is pinned

from envs.backends.warp_sim import Program, WarpSim

_GEOM_GROUP = 0


@wp.kernel(enable_backward=False)
def _shade(
    # model
    geom_type: wp.array[int],
    geom_dataid: wp.array2d[int],
    geom_matid: wp.array2d[int],
    geom_size: wp.array2d[wp.vec3],
    geom_rgba: wp.array2d[wp.vec4],
    mat_rgba: wp.array2d[wp.vec4],
    flex_vertadr: wp.array[int],
    flex_edge: wp.array[wp.vec2i],
    flex_radius: wp.array[float],
    cam_fovy: wp.array2d[float],
    light_type: wp.array2d[int],
    light_active: wp.array2d[bool],
    light_ambient: wp.array2d[wp.vec3],
    light_diffuse: wp.array2d[wp.vec3],
    headlight: wp.array2d[wp.vec3],
    # data
    geom_xpos: wp.array2d[wp.vec3],
    geom_xmat: wp.array2d[wp.mat33],
    flexvert_xpos: wp.array2d[wp.vec3],
    cam_xpos: wp.array2d[wp.vec3],
    cam_xmat: wp.array2d[wp.mat33],
    light_xpos: wp.array2d[wp.vec3],
    light_xdir: wp.array2d[wp.vec3],
    # bounding volume hierarchy
    bvh_id: wp.uint64,
    group_root: wp.array[int],
    bvh_ngeom: int,
    bvh_nflexgeom: int,
    enabled_geom_ids: wp.array[int],
    mesh_bvh_id: wp.array[wp.uint64],
    hfield_bvh_id: wp.array[wp.uint64],
    flex_geom_flexid: wp.array[int],
    flex_geom_edgeid: wp.array[int],
    flex_bvh_id: wp.array[wp.uint64],
    flex_group_root: wp.array2d[int],
    # images
    camera_ids: wp.array[int],
    size: int,
    with_depth: bool,
    rgb: wp.array4d[wp.uint8],
    depth: wp.array3d[float],
) -> None:
    """One ray per thread: (world, view, pixel) -> rgb (N, V, H*W, 3), depth (N, V, H*W) along the camera's axis, m."""
    world, view, pixel = wp.tid()
    camera = camera_ids[view]
    half = wp.tan(0.5 * wp.radians(cam_fovy[world % cam_fovy.shape[0], camera]))
    x = (2.0 * (float(pixel % size) + 0.5) / float(size) - 1.0) * half
    y = (1.0 - 2.0 * (float(pixel // size) + 0.5) / float(size)) * half
    ray = wp.normalize(wp.vec3(x, y, -1.0))
    frame = cam_xmat[world, camera]
    origin = cam_xpos[world, camera]
    direction = frame @ ray
    geom, distance, normal, u, v, face, mesh = cast_ray(
        geom_type, geom_dataid, geom_size, flex_vertadr, flex_edge, flex_radius,
        geom_xpos, geom_xmat, flexvert_xpos, bvh_id, group_root[world], world, bvh_ngeom, bvh_nflexgeom,
        enabled_geom_ids, mesh_bvh_id, hfield_bvh_id, flex_geom_flexid, flex_geom_edgeid, flex_bvh_id, flex_group_root,
        origin, direction, True,
    )  # fmt: skip
    if geom < 0:
        for k in range(3):
            rgb[world, view, pixel, k] = wp.uint8(0)
        if with_depth:
            depth[world, view, pixel] = 0.0
        return
    if with_depth:
        depth[world, view, pixel] = -distance * ray[2]

    material = geom_matid[world % geom_matid.shape[0], geom]
    color = geom_rgba[world % geom_rgba.shape[0], geom]
    if material >= 0:
        color = mat_rgba[world % mat_rgba.shape[0], material]
    gaze = frame @ wp.vec3(0.0, 0.0, -1.0)
    row = world % headlight.shape[0]
    light = headlight[row, 0] + headlight[row, 1] * wp.max(0.0, -wp.dot(normal, gaze))
    point = origin + distance * direction
    for k in range(light_xdir.shape[1]):
        if light_active[world % light_active.shape[0], k]:
            toward = -light_xdir[world, k]
            if light_type[world % light_type.shape[0], k] != 1:  # not directional
                toward = light_xpos[world, k] - point
            facing = wp.max(0.0, wp.dot(normal, wp.normalize(toward)))
            light += light_ambient[world % light_ambient.shape[0], k]
            light += light_diffuse[world % light_diffuse.shape[0], k] * facing
    for k in range(3):
        rgb[world, view, pixel, k] = wp.uint8(wp.clamp(color[k] * light[k], 0.0, 1.0) * 255.0 + 0.5)


class WarpCameras:
    """Square images of a `WarpSim`'s cameras. `rgb` (N, V, H, W, 3) uint8 and `depth` (N, V, H, W) are torch tensors on
    its device, overwritten by every `render`.

    `fields`: each world's own values of what a picture depends on, (N, ...) in MjModel's shapes, to be written in
    place: geom_rgba, cam_pos, cam_quat, cam_fovy, light_dir, light_diffuse, and headlight (N, 2, 3: ambient, diffuse).
    """

    def __init__(
        self, sim: WarpSim, model: mujoco.MjModel, camera_ids: Sequence[int], image_size: int, *, depth: bool = False
    ) -> None:
        n, views, pixels = sim.num_worlds, len(camera_ids), image_size * image_size
        self._sim, self._size, self._depth = sim, image_size, depth
        lamp = model.vis.headlight
        with wp.ScopedDevice(sim.warp_device):
            self._context = mjw.create_render_context(
                model, nworld=n, cam_res=(1, 1), render_rgb=False, render_depth=False, render_seg=False,
                enabled_geom_groups=[_GEOM_GROUP],
            )  # fmt: skip
            self._camera_ids = wp.array(np.array(camera_ids), dtype=int)
            self._rgb = wp.zeros((n, views, pixels, 3), dtype=wp.uint8)
            self._depth_data = wp.zeros((n, views, pixels) if depth else (1, 1, 1), dtype=float)
            self._light_ambient = _per_world(model.light_ambient, n, wp.vec3)
            self._own = {
                "geom_rgba": _per_world(model.geom_rgba, n, wp.vec4),
                "cam_pos": _per_world(model.cam_pos, n, wp.vec3),
                "cam_quat": _per_world(model.cam_quat, n, wp.quat),
                "cam_fovy": _per_world(model.cam_fovy, n, float),
                "light_dir": _per_world(model.light_dir, n, wp.vec3),
                "light_diffuse": _per_world(model.light_diffuse, n, wp.vec3),
                "headlight": _per_world(np.stack([lamp.ambient, lamp.diffuse]) * float(lamp.active), n, wp.vec3),
            }
        for name in ("geom_rgba", "cam_pos", "cam_quat", "cam_fovy", "light_dir"):
            setattr(sim.model, name, self._own[name])
        self.fields = {name: wp.to_torch(array) for name, array in self._own.items()}
        shape = (n, views, image_size, image_size)
        self.rgb = wp.to_torch(self._rgb).view(*shape, 3)
        self.depth = wp.to_torch(self._depth_data).view(shape) if depth else None
        self._cam_xpos, self._cam_xmat = wp.to_torch(sim.data.cam_xpos), wp.to_torch(sim.data.cam_xmat)
        self._ids = torch.as_tensor(np.array(camera_ids, np.int64), device=sim.device)
        self._render = Program(self._launch, sim.warp_device)

    def render(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw every camera of every world as it is now; kinematics must be current, as after `WarpSim.step`."""
        self._render()
        return self.rgb, self.depth

    def intrinsics(self) -> torch.Tensor:
        """(N, V, 3, 3) pinhole matrices, pixels; see `vla.core.types.Observation.intrinsics`."""
        fovy = self.fields["cam_fovy"][:, self._ids]
        out = torch.zeros(*fovy.shape, 3, 3, device=fovy.device)
        out[..., 0, 0] = out[..., 1, 1] = 0.5 * self._size / torch.tan(0.5 * torch.deg2rad(fovy))
        out[..., :2, 2], out[..., 2, 2] = 0.5 * self._size, 1.0
        return out

    def extrinsics(self) -> torch.Tensor:
        """(N, V, 4, 4) world_from_camera at the last render, OpenCV axes: x right, y down, z forward."""
        rotation, position = self._cam_xmat[:, self._ids], self._cam_xpos[:, self._ids]
        out = torch.eye(4, device=position.device).repeat(*position.shape[:2], 1, 1)
        out[..., :3, :3] = rotation * torch.tensor([1.0, -1.0, -1.0], device=position.device)
        out[..., :3, 3] = position
        return out

    def _launch(self) -> None:
        m, d, c = self._sim.model, self._sim.data, self._context
        mjw.camlight(m, d)
        mjw.refit_bvh(m, d, c)
        wp.launch(
            _shade,
            dim=(self._sim.num_worlds, self._rgb.shape[1], self._size * self._size),
            inputs=[
                m.geom_type, m.geom_dataid, m.geom_matid, m.geom_size, m.geom_rgba, m.mat_rgba,
                m.flex_vertadr, m.flex_edge, m.flex_radius, m.cam_fovy, m.light_type, m.light_active,
                self._light_ambient, self._own["light_diffuse"], self._own["headlight"],
                d.geom_xpos, d.geom_xmat, d.flexvert_xpos, d.cam_xpos, d.cam_xmat, d.light_xpos, d.light_xdir,
                c.bvh_id, c.group_root, c.bvh_ngeom, c.bvh_nflexgeom, c.enabled_geom_ids, c.mesh_bvh_id,
                c.hfield_bvh_id, c.flex_geom_flexid, c.flex_geom_edgeid, c.flex_bvh_id, c.flex_group_root,
                self._camera_ids, self._size, self._depth,
            ],
            outputs=[self._rgb, self._depth_data],
        )  # fmt: skip


def _per_world(values: np.ndarray, num_worlds: int, dtype: type) -> wp.array:
    return wp.array(np.repeat(np.asarray(values, np.float32)[None], num_worlds, axis=0), dtype=dtype)
