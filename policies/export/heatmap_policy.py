"""Exported policies that answer by heat-maps: one graph for a look, asked twice. Numpy and onnxruntime suffice.

A look goes from three views to where the hand should go; drawing the views, choosing where to look again and going
there is done here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.export.exported_policy import ExportConfig, ExportedPolicy, Graph, read_folder
from policies.export.heatmap_views import draw, points_of
from vla.core.config import decode
from vla.core.types import ActionChunk, Observation, Prefix
from vla.model.heatmap.config import HeatmapConfig
from vla.model.heatmap.execution import Execution, Keyframes, require_sight
from vla.processing.batch import trimmed_text
from vla.processing.preprocess import Preprocessor

KEY = "heatmap"
"""Entry of config.json: a `HeatmapConfig`."""
LOOK_INPUTS = ("views", "token_ids", "token_mask", "hand", "state", "centre", "half")
"""Input names of the graph: views (B, 3, R, R, 3) uint8; the hand's position (B, 3), m; what else the normalised state
tells (B, S); centre (B, 3) and half side (B,) of the cube that the views show, m."""
LOOK_OUTPUTS = ("heat", "position", "verdicts")
"""Logits of the views' heat-maps (B, 3, R, R); where they are highest together (B, 3), m; logits of the verdicts
there: flags, and bins of the hand's orientation."""


class ExportedHeatmapPolicy(ExportedPolicy):
    """A `vla.core.types.Policy` around a look's graph. Stateless: each observation decides alone."""

    def __init__(self, config: ExportConfig, heatmap: HeatmapConfig, processor: Preprocessor, graph: Graph) -> None:
        super().__init__(config, processor, graph)
        self.heatmap = heatmap
        self.execution = Execution(heatmap, processor)

    @staticmethod
    def load(folder: str | os.PathLike[str], *, threads: int | None = None) -> ExportedHeatmapPolicy:
        """See `ExportedPolicy.load`."""
        whole, config, processor, graph = read_folder(folder, threads)
        if KEY not in whole:
            raise ValueError(f"{os.fspath(folder)} is no exported policy with heat-maps")
        return ExportedHeatmapPolicy(config, decode(HeatmapConfig, whole[KEY]), processor, graph)

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """The way (B, chunk_size, A) to the next keyframe: see `vla.model.heatmap.policy.HeatmapPolicy.act`."""
        return self.execution.chunk(obs, self._decide)

    def _decide(self, seen: Any, proprio: NDArray[np.float64]) -> Keyframes:
        workspace, columns = self.heatmap.workspace, self.execution.columns
        scenes, batch = points_of(seen), len(proprio)
        centre_B3 = np.tile(np.array(workspace.centre_m, np.float32), (batch, 1))
        half_m = workspace.half_m
        sees = [points.within(*at).any() for points, at in zip(scenes, ((c, half_m) for c in centre_B3), strict=True)]
        require_sight(np.array(sees), workspace)
        words = trimmed_text(seen.token_ids_BT, seen.token_mask_BT)
        robot = (proprio[:, columns.hand].astype(np.float32), seen.proprio_BP[:, columns.state])
        for half_m in (workspace.half_m, workspace.half_m / workspace.zoom):
            views = np.stack([draw(points, c, half_m, workspace) for points, c in zip(scenes, centre_B3, strict=True)])
            inputs = (views, *words, *robot, centre_B3, np.full(batch, half_m, np.float32))
            _, centre_B3, verdicts = self._graph(dict(zip(LOOK_INPUTS, map(np.ascontiguousarray, inputs), strict=True)))
        return Keyframes.of(centre_B3, verdicts, self.heatmap)
