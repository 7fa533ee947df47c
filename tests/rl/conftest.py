"""One imitation policy for all RL tests: half of its episodes succeed."""

import pytest
import torch

from tests.rl.toy import imitate


@pytest.fixture(scope="session")
def cloned() -> dict[str, torch.Tensor]:
    return imitate(0).state_dict()
