"""The presets are the shapes that the Hub publishes."""

import pytest

PUBLISHED = {
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-v2": "deepseek-ai/DeepSeek-V2",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "moonlight-16b-a3b": "moonshotai/Moonlight-16B-A3B",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
}


@pytest.mark.network
@pytest.mark.parametrize(("preset", "repo"), PUBLISHED.items())
def test_a_preset_says_what_the_config_on_the_hub_says(preset, repo):
    from hub_moe.modeling import HubMoeConfig
    from hub_moe.modeling.presets import PRESETS

    ours = HubMoeConfig.from_preset(preset)
    published = HubMoeConfig.from_pretrained(repo, revision="main")
    for name in PRESETS[preset]:
        assert getattr(published, name) == getattr(ours, name), name
