"""LeRobot's own writer, without its chatter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def quietly() -> Iterator[None]:
    """Without LeRobot's warnings: where FFmpeg is missing it prints all of its attempts, and no video is written. And
    without a progress bar for each episode."""
    import datasets

    before, barred = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(before)
        if not barred:
            datasets.enable_progress_bars()


def new_dataset(root: Path, name: str, fps: int, features: dict[str, Any], robot_type: str | None = None) -> Any:
    """A LeRobotDataset in the new folder `root`, to which frames are added."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    videos = any(feature["dtype"] == "video" for feature in features.values())
    with quietly():
        return LeRobotDataset.create(
            f"local/{name}", fps, root=root, features=features, robot_type=robot_type, use_videos=videos
        )
