"""Two imitation policies for all RL tests: half of the first one's episodes succeed, nearly all of the second's."""

import pytest
import torch

from tests.rl.toy import imitate


@pytest.fixture(scope="session")
def cloned() -> dict[str, torch.Tensor]:
    return imitate(0).state_dict()


@pytest.fixture(scope="session")
def precise() -> dict[str, torch.Tensor]:
    return imitate(0, offset=0.0).state_dict()
