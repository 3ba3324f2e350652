"""From a training of chosen experts to a patch: what part trains, what is saved, what a reader gets."""

import copy

import pytest
import torch

from hub_moe.experts.split import merge_experts, split_experts, trained_tensors
from hub_moe.patches import ExpertPatch, apply_patch, hash_base, make_patch, remove_patch
from tests.anatomy.families import FAMILIES

from .patching import BASE, build_model, changed_names, hashes, last_layers, names_of, patch_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_of_trained_experts_gives_the_base_the_trained_model(tmp_path, family):
    base = build_model(family)
    model = copy.deepcopy(base).train()
    chosen = {last_layers(model)[-1]: [1, 4]}
    before = hash_base(model, names_of(model, chosen))
    split_experts(model, chosen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = torch.arange(2, 66).reshape(2, 32)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        torch.optim.SGD(parameters, lr=1.0).step()
    make_patch(trained_tensors(model), model_before=before, base=BASE).save(tmp_path / "patch")
    merge_experts(model)
    patch = ExpertPatch.load(tmp_path / "patch")
    assert {layer: list(experts) for layer, experts in patch.metadata.experts.items()} == chosen
    untouched = hashes(base)
    apply_patch(base, patch)
    trained = hashes(base)
    assert changed_names(untouched, trained)
    experts = {name: sha256 for name, sha256 in hashes(model).items() if name in patch.tensors}
    assert experts == {name: trained[name] for name in patch.tensors}


def test_a_patch_goes_onto_a_model_whose_experts_are_split_and_is_kept_by_merging():
    model = build_model()
    patch = patch_experts(model, {1: [0, 1]})
    expected = copy.deepcopy(model)
    apply_patch(expected, patch)
    before = hashes(model)
    split_experts(model, {1: [1], 2: [3]})
    apply_patch(model, patch)
    twin = copy.deepcopy(model)
    merge_experts(model)
    assert hashes(model) == hashes(expected)
    remove_patch(twin)
    merge_experts(twin)
    assert hashes(twin) == before
