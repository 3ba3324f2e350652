"""The fixtures are what their docstrings promise."""


def test_the_tiny_model_has_at_most_50_thousand_parameters(tiny_model):
    assert sum(parameter.numel() for parameter in tiny_model.parameters()) <= 50_000


def test_the_tiny_model_has_the_same_weights_whatever_ran_before(tiny_model, tiny_config):
    import torch

    from hub_moe.modeling import HubMoeForCausalLM

    torch.manual_seed(0)
    again = HubMoeForCausalLM(tiny_config)
    torch.rand(3)
    for one, other in zip(tiny_model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_tiny_tokenizer_fits_the_tiny_model_and_loses_nothing(tiny_tokenizer, tiny_config):
    text = "Printable ASCII: {[(<|>)]} ~ 0123456789\nand a second line."
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(tiny_tokenizer) == tiny_config.vocab_size
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.eos_token_id == tiny_config.eos_token_id
    assert tiny_tokenizer.pad_token_id == tiny_config.pad_token_id
