import pytest


@pytest.fixture
def datasets_cache(monkeypatch, tmp_path):
    """What datasets reads lies below the test's folder and goes with it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
