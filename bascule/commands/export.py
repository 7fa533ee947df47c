"""`vla export`: checkpoints as ONNX, torch.export or AOTInductor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bascule.commands.base import Command, check_numbers


@dataclass(frozen=True)
class Export(Command):
    """Export a checkpoint to ONNX, torch.export or AOTInductor: a folder that runs without transformers."""

    policy: Positional[Path]
    """A checkpoint folder."""
    out: Path
    """The folder to write. `vla serve`, `vla eval` and `vla control` take it as a policy. An earlier
    export there is replaced."""
    format: Literal["onnx", "torch", "aoti"] = "onnx"
    """onnx: for onnxruntime, without torch. torch: a torch.export package, read by torch alone. aoti: compiled by
    AOTInductor for this kind of processor; needs a C++ compiler here, and torch where it runs."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """bfloat16 with torch and aoti only, int8 (quantised weights) with onnx only."""
    embodiment: Annotated[str | None, arg(aliases=["--member"])] = None
    """The robot to control, for a policy trained for several."""
    n_action_steps: int | None = None
    """Actions executed of each chunk. Default: the checkpoint's own."""
    observations: int = 100
    """Number of random observations on which the export is compared with the model."""

    def run(self) -> None:
        """Export the checkpoint and print the largest error of its normalised actions."""
        check_numbers(self, n_action_steps=(1, 10_000), observations=(1, 100_000))
        from bascule.catalogue import trained
        from policies.export.exported_policy import refuse_others

        folder = trained(self.policy)
        refuse_others(folder, self.out)
        from policies.export.exporter import export
        from policies.load import chosen_embodiment
        from vla.core.checkpoint import read_config
        from vla.runtime.console import stdout

        member = chosen_embodiment(folder, self.embodiment)
        asked = {"format": self.format, "precision": self.precision, "n_action_steps": self.n_action_steps}
        if "heatmap" in read_config(folder):
            from policies.export.heatmap_exporter import export_heatmap

            config, compared = export_heatmap(folder, self.out, observations=self.observations, **asked), "answers"
        else:
            config = export(folder, self.out, member=member, observations=self.observations, **asked)
            compared = "normalised actions"
        parity = config.parity
        stdout().print(
            f"{self.out}: {config.format}, {config.precision}; on {parity.observations} random observations its "
            f"{compared} differ from the model's by at most {parity.max_error:.1e} (mean "
            f"{parity.mean_error:.1e})"
        )
