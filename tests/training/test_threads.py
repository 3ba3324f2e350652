import torch

from hub_moe.training.processes import choose_num_threads


def test_choice_is_one_or_all_threads_and_leaves_the_model_as_it_was(tiny_model):
    before = torch.get_num_threads()
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    try:
        torch.set_num_threads(2)
        chosen = choose_num_threads(tiny_model, torch.randint(2, 128, (2, 8)), steps=1)
        assert chosen in (1, 2)
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)
    assert not tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_model.state_dict().items())
