"""A policy's cameras by the names that a robot has for them, where those differ or the robot lacks one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vla.core.config import unknown

LACKING = "none"
"""Written in place of the robot's camera where it has none."""


@dataclass(frozen=True)
class CameraMap:
    """Which of the robot's cameras each of a policy's views is read from; those that are not named keep their name."""

    robots: Mapping[str, str | None] = field(default_factory=dict)
    """The policy's camera -> the robot's; None: the robot lacks it, and the view is black."""

    def __bool__(self) -> bool:
        """False if every camera keeps its name."""
        return bool(self.robots)

    @staticmethod
    def parse(entries: Sequence[str]) -> CameraMap:
        """From POLICY=ROBOT entries, e.g. ["front=cam_high", "wrist=none"], each of which may hold several, with
        commas between. ValueError for what is no such entry."""
        found: dict[str, str | None] = {}
        for entry in filter(None, ",".join(entries).split(",")):
            ours, equals, theirs = (part.strip() for part in entry.partition("="))
            if not (ours and equals and theirs):
                raise ValueError(
                    f"--cameras: '{entry}' does not say which camera to look through: write POLICY=ROBOT, the policy's "
                    f"name for it and the robot's, or POLICY={LACKING} where the robot has no such camera"
                )
            if ours in found:
                raise ValueError(f"--cameras names the policy's camera '{ours}' twice: give it once")
            found[ours] = None if theirs == LACKING else theirs
        return CameraMap(found)

    def laid(self, cameras: Sequence[str]) -> tuple[str, ...]:
        """The robot's names of a policy's cameras, in the policy's order; "" for one that it lacks, as for one that
        the policy itself lacks (`ProcessorConfig.cameras`).

        ValueError for a camera that the policy does not read, one that would be looked through twice, and a policy
        that is left without any.
        """
        known = [camera for camera in cameras if camera]
        if foreign := [camera for camera in self.robots if camera not in known]:
            raise ValueError(f"--cameras: {unknown(foreign[0], known, 'camera of the policy')}")
        names = tuple((self.robots.get(camera, camera) or "") if camera else "" for camera in cameras)
        seen = [name for name in names if name]
        if not seen:
            raise ValueError("--cameras leaves the policy without any camera: it would act blindly")
        if twice := [name for name in seen if seen.count(name) > 1]:
            readers = " and ".join(f"'{ours}'" for ours, name in zip(cameras, names, strict=True) if name == twice[0])
            raise ValueError(
                f"--cameras: the policy's cameras {readers} would both look through '{twice[0]}': name another one, or "
                f"{LACKING}"
            )
        return names

    def renamed[T](self, given: Mapping[str, T], cameras: Sequence[str]) -> dict[str, T]:
        """Pictures, or anything else of the robot's cameras, by the policy's names, without those that the robot lacks.
        ValueError naming one that is not there."""
        laid = dict(zip(cameras, self.laid(cameras), strict=True))
        if missing := [name for name in laid.values() if name and name not in given]:
            raise ValueError(f"the observation lacks camera '{missing[0]}'; it has {', '.join(given) or 'none'}")
        return {ours: given[name] for ours, name in laid.items() if name}
