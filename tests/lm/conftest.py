"""Runs of training without their curves."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_loss_curves():
    """Drawing takes longer than these runs do; what draws is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastattn.lm.train.loop.plot_losses", lambda *_: None)
        yield
