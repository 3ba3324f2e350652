"""Repos, accounts, access, cards and search through the unmodified client."""

import json

import pytest
from huggingface_hub import ModelCard, RepoCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from safetensors.numpy import save

# The client's own way to send a large file over HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [moe, {tag}]
base_model: alice/base
datasets: [alice/data]
date: 2026-01-01
---
# A model, see https://arxiv.org/abs/2401.06066
"""


def put(api, repo_id, path, content, **options):
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **options)


def post(url, api, **options):
    return get_session().post(url, headers={"authorization": f"Bearer {api.token}"}, **options)


def test_a_token_says_who_one_is(api, reader, nobody):
    assert api.whoami()["name"] == "alice"
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_false")


def test_a_repo_is_created_once_moved_and_deleted(api, repo_id):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo_id)
    assert api.create_repo(repo_id, exist_ok=True).repo_id == repo_id
    api.move_repo(repo_id, f"{repo_id}-moved")
    assert api.repo_exists(repo_id)
    api.delete_repo(f"{repo_id}-moved")
    assert not api.repo_exists(repo_id)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(f"{repo_id}-moved")
    api.delete_repo(f"{repo_id}-moved", missing_ok=True)


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_datasets_and_spaces_have_repos_of_their_own(api, repo_id, kind, tmp_path):
    api.create_repo(repo_id, repo_type=kind, space_sdk="static" if kind == "space" else None)
    put(api, repo_id, "x.txt", b"1", repo_type=kind)
    with open(api.hf_hub_download(repo_id, "x.txt", repo_type=kind, cache_dir=tmp_path)) as file:
        assert file.read() == "1"
    assert "x.txt" not in api.list_repo_files(repo_id)
    listed = api.list_datasets(author="alice") if kind == "dataset" else api.list_spaces(author="alice")
    assert repo_id in [info.id for info in listed]
    assert api.repo_info(repo_id, repo_type=kind).sha


def test_a_private_repo_does_not_exist_for_others(api, bob, nobody, repo_id, tmp_path):
    put(api, repo_id, "x.txt", b"secret")
    api.update_repo_settings(repo_id, private=True)
    assert api.model_info(repo_id).private
    for stranger in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info(repo_id)
        with pytest.raises(RepositoryNotFoundError):
            stranger.hf_hub_download(repo_id, "x.txt", cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            put(stranger, repo_id, "x.txt", b"mine")
        assert repo_id not in [info.id for info in stranger.list_models()]


def test_only_the_owner_with_a_write_token_changes_a_repo(api, bob, reader, nobody, repo_id):
    for other, status in ((bob, 403), (reader, 403), (nobody, 401)):
        with pytest.raises(HfHubHTTPError) as refused:
            put(other, repo_id, "x.txt", b"1")
        assert refused.value.response.status_code == status
        with pytest.raises(HfHubHTTPError):
            other.delete_repo(repo_id)
        with pytest.raises(HfHubHTTPError):
            other.create_branch(repo_id, branch="x")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("alice/not-bobs")
    assert api.list_repo_files(repo_id) == [".gitattributes"]


def test_a_gated_repo_opens_to_whom_the_owner_lets_in(api, bob, nobody, repo_id, tmp_path):
    put(api, repo_id, "x.txt", b"1")
    api.update_repo_settings(repo_id, gated="manual")
    assert bob.model_info(repo_id).gated == "manual"
    for stranger in (bob, nobody):
        with pytest.raises(GatedRepoError):
            stranger.hf_hub_download(repo_id, "x.txt", cache_dir=tmp_path)
        with pytest.raises(GatedRepoError):
            stranger.auth_check(repo_id)
    api.grant_access(repo_id, "bob")
    assert [request.username for request in api.list_accepted_access_requests(repo_id)] == ["bob"]
    assert bob.hf_hub_download(repo_id, "x.txt", cache_dir=tmp_path)
    api.reject_access_request(repo_id, "bob", rejection_reason=None)
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo_id)


def test_a_model_says_what_its_card_config_and_weights_say(api, repo_id):
    import numpy

    put(api, repo_id, "README.md", CARD.format(tag="x").encode())
    put(api, repo_id, "config.json", b'{"model_type": "hub_moe", "architectures": ["A"], "auto_map": {}}')
    put(api, repo_id, "model.safetensors", save({"w": numpy.zeros((3, 5), numpy.float32)}))
    info = api.model_info(repo_id, files_metadata=True)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "text-generation")
    assert {"moe", "license:mit", "base_model:alice/base", "base_model:finetune:alice/base"} <= {*info.tags}
    assert {"dataset:alice/data", "arxiv:2401.06066", "custom_code", "safetensors", "hub_moe"} <= {*info.tags}
    assert (info.safetensors.total, info.safetensors.parameters) == (15, {"F32": 15})
    assert info.card_data.license == "mit"
    assert info.config["model_type"] == "hub_moe"
    sizes = {file.rfilename: file.size for file in info.siblings}
    assert sizes["config.json"] == 65
    assert api.get_safetensors_metadata(repo_id).parameter_count == {"F32": 15}
    expanded = api.model_info(repo_id, expand=["baseModels", "safetensors", "cardData"])
    assert expanded.base_models == {"relation": "finetune", "models": [{"id": "alice/base"}]}


def test_the_weights_of_a_sharded_model_are_described_without_being_sent(api, repo_id):
    import numpy

    weight_map = {f"w{number}": f"model-{number}.safetensors" for number in (1, 2)}
    for name, path in weight_map.items():
        put(api, repo_id, path, save({name: numpy.zeros((3, 5), numpy.float32)}))
    index = {"metadata": {"total_size": 120}, "weight_map": weight_map}
    put(api, repo_id, "model.safetensors.index.json", json.dumps(index).encode())
    metadata = api.get_sharded_safetensors_metadata(repo_id)
    assert (metadata.metadata, metadata.parameter_count, metadata.weight_map) == (
        {"total_size": 120},
        {"F32": 30},
        weight_map,
    )
    for shard, status in (("missing", 404), ("../../etc/passwd", 422), (1, 400), ("model.safetensors.index.json", 404)):
        put(api, repo_id, "bad.json", json.dumps({"weight_map": {"w": shard}}).encode())
        with pytest.raises(HfHubHTTPError) as refused:
            api.get_sharded_safetensors_metadata(repo_id, filename="bad.json")
        assert refused.value.response.status_code == status


def test_models_are_found_by_author_text_tags_and_base(api, repo_id):
    tag = repo_id.rpartition("/")[2]
    put(api, repo_id, "README.md", CARD.format(tag=tag).encode())
    assert [info.id for info in api.list_models(filter=[tag, "license:mit"])] == [repo_id]
    assert [info.id for info in api.list_models(search=tag.upper())] == [repo_id]
    assert repo_id in [info.id for info in api.list_models(filter="base_model:alice/base", full=True)]
    assert list(api.list_models(author="bob", search=tag)) == []
    assert list(api.list_models(filter=tag, pipeline_tag="text-classification")) == []
    assert [info.id for info in api.list_models(limit=1, sort="last_modified")] == [repo_id]


def test_a_list_longer_than_a_page_is_followed(api, repo_id):
    api.create_repo(f"{repo_id}-2")
    found = list(api.list_models(search=repo_id, expand=["sha"]))
    assert len({info.id for info in found}) == 2


def test_a_card_is_pushed_loaded_and_checked(api, hub, repo_id):
    put(api, repo_id, "README.md", CARD.format(tag="x").encode())
    local = api.hf_hub_download(repo_id, "README.md")
    assert ModelCard.load(local).data.license == "mit"
    assert isinstance(RepoCard.load(local), RepoCard)
    bad = {"content": "---\nlicense: {{mit\n---\n", "repoType": "model"}
    answer = post(f"{hub.url}/api/validate-yaml", api, json=bad)
    assert answer.status_code == 400
    assert "Invalid YAML" in answer.json()["errors"][0]["message"]


def test_a_card_may_begin_with_empty_lines_and_is_checked_there_too(api, repo_id):
    put(api, repo_id, "README.md", b"\n\n---\nlicense: mit\n---\n")
    assert api.model_info(repo_id).card_data.license == "mit"
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        put(api, repo_id, "README.md", b"\n---\nmodel-index: foo\n---\n")


def test_every_answer_has_an_id_that_errors_show(api, hub):
    ids = {
        get_session().get(f"{hub.url}{path}").headers["x-request-id"] for path in ("/api/models", "/nothing", "/api/x")
    }
    assert len(ids) == 3
    with pytest.raises(RepositoryNotFoundError, match=r"\(Request ID: [0-9a-f]{24}\)"):
        api.model_info("alice/nothing")


def test_a_repo_with_a_broken_card_and_weights_is_still_listed(api, repo_id):
    text = "---\na: &x [1]\nb: *x\nnan: .nan\n---\n"  # the client would refuse to send it
    file = {"path": "README.md", "content": text, "encoding": "utf-8"}
    lines = [{"key": "header", "value": {"summary": "broken"}}, {"key": "file", "value": file}]
    body = "\n".join(map(json.dumps, lines))
    sent = post(f"{api.endpoint}/api/models/{repo_id}/commit/main", api, content=body)
    assert sent.status_code == 200
    put(api, repo_id, "model.safetensors", b"\xff" * 100)
    put(api, repo_id, "config.json", b"[" * 100_000)
    info = api.model_info(repo_id)
    assert info.card_data is None
    assert info.safetensors is None
    assert repo_id in [found.id for found in api.list_models(full=True)]


def test_what_does_not_exist_is_not_found(api):
    for name in ("alice/nothing", "nothing", "nobody/nothing"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(name)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(name, "config.json")
