"""Makes the preset "tiny" smaller: these tests are about the commands, not the model."""

import pytest

from fastattn.lm.models import PRESETS


@pytest.fixture(autouse=True, scope="module")
def smaller_tiny():
    sizes = {"width": 48, "layers": 1, "heads": 3, "kv_heads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", PRESETS["tiny"] | sizes)
        yield


@pytest.fixture(autouse=True)
def no_loss_curves(monkeypatch):
    """Drawing takes longer than these runs do; what draws is tested by itself."""
    monkeypatch.setattr("fastattn.lm.train.loop.plot_losses", lambda *_: None)
