import pytest


@pytest.fixture
def datasets_cache(monkeypatch, tmp_path):
    """What datasets reads lies below the test's folder and goes with it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_tokenizer):
    """A base and a patch for it, each with its record in `evals`; tests change copies only."""
    from tests.anatomy.families import tiny_config

    from .checkpoints import evaluate, save_model, save_patch

    root = tmp_path_factory.mktemp("verify")
    base = save_model(root / "base", tiny_config("hub_moe"), tiny_tokenizer)
    patch = save_patch(root / "patch", base, tiny_tokenizer)
    for model in (base, patch):
        evaluate(model, model / "evals", limit=4)
    return root


@pytest.fixture
def forger(world):
    """Of the record of the base."""
    from .forging import Forger, record_of

    return Forger(record_of(world / "base"))
