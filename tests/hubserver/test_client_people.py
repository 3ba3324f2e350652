"""Likes, moved and copied repos, gates, organisations and attachments through the unmodified client."""

import json

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

LARGE = bytes(range(256)) * 4000
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(100)


def put(api, repo_id, path, content, **options):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **options)


def send(api, method, path, **options):
    headers = {"authorization": f"Bearer {api.token}"} if api.token else {}
    return get_session().request(method, f"{api.endpoint}{path}", headers=headers, **options)


def find_faults_of(hub):
    with Store(hub.root) as store:
        return list(find_faults(store, read_blobs=False))


def test_the_old_name_of_a_repo_leads_to_the_new_one_until_it_is_taken_again(api, bob, repo_id, tmp_path):
    put(api, repo_id, "w.bin", LARGE)
    moved = f"{repo_id}-moved"
    api.move_repo(repo_id, moved)
    assert api.model_info(repo_id).id == moved
    with open(bob.hf_hub_download(repo_id, "w.bin", cache_dir=tmp_path), "rb") as file:
        assert file.read() == LARGE
    put(api, repo_id, "x.txt", b"through the old name")
    assert "x.txt" in api.list_repo_files(moved)
    answer = send(api, "GET", f"/api/models/{repo_id}/tree/main/?recursive=true", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, f"/api/models/{moved}/tree/main/?recursive=true")
    api.create_repo(repo_id)
    assert api.list_repo_files(repo_id) == [".gitattributes"]
    api.delete_repo(repo_id)
    assert not api.repo_exists(repo_id)


def test_a_repo_that_moves_back_and_forth_has_one_name(api, repo_id):
    moved = f"{repo_id}-moved"
    api.move_repo(repo_id, moved)
    api.move_repo(moved, repo_id)
    assert api.model_info(moved).id == repo_id
    other = api.create_repo(f"{repo_id}-other").repo_id
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.move_repo(repo_id, other)
    api.delete_repo(repo_id)
    assert not api.repo_exists(moved)


def test_a_moved_private_repo_tells_strangers_nothing(api, bob, repo_id):
    api.update_repo_settings(repo_id, private=True)
    api.move_repo(repo_id, f"{repo_id}-secret-name")
    answer = send(bob, "GET", f"/api/models/{repo_id}", follow_redirects=False)
    assert answer.status_code == 404
    assert "secret-name" not in answer.text + str(answer.headers)


def test_users_like_repos(api, bob, reader, nobody, repo_id):
    assert send(bob, "POST", f"/api/models/{repo_id}/like").status_code == 200
    assert send(bob, "POST", f"/api/models/{repo_id}/like").status_code == 200
    assert send(api, "POST", f"/api/models/{repo_id}/like").status_code == 200
    assert send(reader, "POST", f"/api/models/{repo_id}/like").status_code == 403
    assert send(nobody, "POST", f"/api/models/{repo_id}/like").status_code == 401
    assert [user.username for user in api.list_repo_likers(repo_id)] == ["bob", "alice"]
    assert api.model_info(repo_id).likes == 2
    assert next(iter(api.list_models(sort="likes", limit=1))).likes >= 2
    assert repo_id in nobody.list_liked_repos("bob").models
    bob.unlike(repo_id)
    assert api.model_info(repo_id).likes == 1


def test_what_is_liked_in_private_stays_private(api, bob, repo_id):
    send(bob, "POST", f"/api/models/{repo_id}/like")
    api.update_repo_settings(repo_id, private=True)
    assert repo_id not in bob.list_liked_repos("bob").models
    assert repo_id in api.list_liked_repos("bob").models
    with pytest.raises(RepositoryNotFoundError):
        list(bob.list_repo_likers(repo_id))
    assert send(bob, "POST", f"/api/models/{repo_id}/like").status_code == 404


def test_a_repo_is_duplicated_with_history_tags_and_large_files(api, bob, hub, repo_id, tmp_path):
    put(api, repo_id, "w.bin", LARGE)
    api.create_tag(repo_id, tag="v1", tag_message="one")
    put(bob, repo_id, "x.txt", b"proposed", create_pr=True)
    copy = bob.duplicate_repo(repo_id, f"bob/{repo_id.partition('/')[2]}-copy").repo_id
    assert [one.title for one in bob.list_repo_commits(copy)] == [one.title for one in api.list_repo_commits(repo_id)]
    refs = bob.list_repo_refs(copy, include_pull_requests=True)
    assert ([tag.name for tag in refs.tags], refs.pull_requests) == (["v1"], [])
    with open(bob.hf_hub_download(copy, "w.bin", revision="v1", cache_dir=tmp_path), "rb") as file:
        assert file.read() == LARGE
    put(bob, copy, "again.bin", LARGE)
    with pytest.raises(HfHubHTTPError, match="409"):
        bob.duplicate_repo(repo_id, copy)
    assert bob.duplicate_repo(repo_id, copy, exist_ok=True).repo_id == copy
    assert find_faults_of(hub) == []


def test_what_is_private_is_duplicated_only_by_who_may_read_it_and_stays_private(api, bob, repo_id):
    api.update_repo_settings(repo_id, private=True)
    with pytest.raises(RepositoryNotFoundError):
        bob.duplicate_repo(repo_id)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.duplicate_repo(repo_id, "bob/not-alices")
    assert api.model_info(api.duplicate_repo(repo_id, f"{repo_id}-copy").repo_id).private
    assert not api.model_info(api.duplicate_repo(repo_id, f"{repo_id}-open", private=False).repo_id).private


def test_a_request_for_access_goes_from_one_list_to_the_other(api, bob, repo_id):
    api.update_repo_settings(repo_id, gated="manual")
    assert send(bob, "POST", f"/api/models/{repo_id}/ask-access").json() == {"status": "pending"}
    (asked,) = api.list_pending_access_requests(repo_id)
    assert (asked.username, asked.status) == ("bob", "pending")
    api.accept_access_request(repo_id, request_id=asked.request_id)
    bob.auth_check(repo_id)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.accept_access_request(repo_id, "bob")
    with pytest.raises(HfHubHTTPError, match="has asked for access already"):
        api.grant_access(repo_id, "bob")
    api.cancel_access_request(repo_id, "bob")
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo_id)
    api.reject_access_request(repo_id, "bob", rejection_reason="because")
    assert [one.username for one in api.list_rejected_access_requests(repo_id)] == ["bob"]
    for act in (bob.list_pending_access_requests, bob.list_accepted_access_requests):
        with pytest.raises(HfHubHTTPError, match="403"):
            list(act(repo_id))
    with pytest.raises(HfHubHTTPError, match="404"):
        api.grant_access(repo_id, "nobody-at-all")


def test_people_and_their_repos_are_shown(api, bob, repo_id):
    put(api, repo_id, "w.bin", LARGE)
    own = {repo.id: repo for repo in api.list_user_repos()}
    assert (own[repo_id].storage, own[repo_id].visibility) == (len(LARGE), "public")
    assert repo_id not in {repo.id for repo in bob.list_user_repos()}
    assert api.get_user_overview("alice").num_models >= 1
    assert list(api.list_user_followers("alice")) == list(api.list_user_following("alice")) == []
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_user_overview("nobody-at-all")


def test_a_picture_is_attached_and_shown_as_what_it_is(api, nobody, reader, tmp_path):
    (tmp_path / "x.png").write_bytes(PICTURE)
    url = api.upload_attachment(tmp_path / "x.png")
    answer = get_session().get(url)
    assert (answer.content, answer.headers["content-type"]) == (PICTURE, "image/png")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for stranger in (nobody, reader):
        with pytest.raises(HfHubHTTPError):
            stranger.upload_attachment(tmp_path / "x.png")
    page = {"content": b"<script>", "headers": {"content-type": "text/html", "authorization": f"Bearer {api.token}"}}
    assert get_session().post(f"{api.endpoint}/uploads", **page).status_code == 400
    assert get_session().get(f"{api.endpoint}/uploads/..%2fhub.sqlite3").status_code == 404


def test_a_space_is_files_and_says_that_it_does_not_run(api, repo_id):
    api.create_repo(repo_id, repo_type="space", space_sdk="docker", space_variables=[{"key": "A", "value": "1"}])
    assert api.space_info(repo_id).card_data.sdk == "docker"
    assert api.get_space_runtime(repo_id).stage == "STOPPED"
    assert api.list_space_templates() == []
    with pytest.raises(HfHubHTTPError, match="does not run"):
        api.restart_space(repo_id)


def test_models_are_found_by_size_and_nothing_by_what_runs_elsewhere(api, repo_id):
    header = json.dumps({"w": {"dtype": "F32", "shape": [3000, 2], "data_offsets": [0, 24000]}}).encode()
    put(api, repo_id, "model.safetensors", len(header).to_bytes(8, "little") + header + bytes(24000))

    def find(**filters):
        return [info.id for info in api.list_models(search=repo_id, **filters)]

    assert find(num_parameters="min:6K,max:0.006M") == find(apps="safetensors") == [repo_id]
    assert find(num_parameters="min:6001") == find(inference="warm") == find(apps="vllm") == []
    with pytest.raises(HfHubHTTPError, match="num_parameters is like"):
        find(num_parameters="many")


def test_a_short_commit_id_is_a_revision(api, repo_id, tmp_path):
    commit = put(api, repo_id, "x.txt", b"1").oid
    put(api, repo_id, "x.txt", b"2")
    with open(api.hf_hub_download(repo_id, "x.txt", revision=commit[:7], cache_dir=tmp_path)) as file:
        assert file.read() == "1"
    assert api.model_info(repo_id, revision=commit[:12]).sha == commit
    assert not api.revision_exists(repo_id, commit[:6])
    assert not api.revision_exists(repo_id, "0" * 7)


@pytest.mark.parametrize("rewrite", [True, False])
def test_large_files_are_listed_and_deleted_for_good(api, bob, hub, repo_id, rewrite):
    put(api, repo_id, "keep.txt", b"kept")
    put(api, repo_id, "dir/w.bin", LARGE, commit_message="Add weights")
    put(api, repo_id, "other.bin", LARGE[:-1], create_pr=True)
    api.create_tag(repo_id, tag="v1")
    files = {file.filename: file for file in api.list_lfs_files(repo_id)}
    assert {path: (file.size, file.ref) for path, file in files.items()} == {
        "dir/w.bin": (len(LARGE), "refs/heads/main"),
        "other.bin": (len(LARGE) - 1, "refs/pr/1"),
    }
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.permanently_delete_lfs_files(repo_id, [files["dir/w.bin"]])
    before = api.list_repo_commits(repo_id)
    api.permanently_delete_lfs_files(repo_id, [files["dir/w.bin"]], rewrite_history=rewrite)
    assert [file.filename for file in api.list_lfs_files(repo_id)] == ["other.bin"]
    assert ("dir/w.bin" in api.list_repo_files(repo_id, revision="v1")) != rewrite
    assert not api.file_exists(repo_id, "dir/w.bin")
    after = api.list_repo_commits(repo_id)
    assert [(one.title, one.created_at) for one in before] == [(one.title, one.created_at) for one in after]
    assert (before[0].commit_id == after[0].commit_id) != rewrite
    assert api.model_info(repo_id).sha == after[0].commit_id
    api.merge_pull_request(repo_id, 1)
    assert api.file_exists(repo_id, "other.bin")
    put(api, repo_id, "again.bin", LARGE)
    assert api.file_exists(repo_id, "again.bin")
    assert find_faults_of(hub) == []
