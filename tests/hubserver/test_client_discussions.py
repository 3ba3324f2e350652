"""Discussions and pull requests through the unmodified client, over HTTP and over hf_xet."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

LARGE = bytes(range(256)) * 400


def propose(api, repo_id, files, title="A change", **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message=title, create_pr=True, **options)


def test_anybody_may_propose_a_change_and_the_owner_merges_it(api, bob, repo_id, tmp_path):
    info = propose(bob, repo_id, {"w.bin": LARGE, "x.txt": b"1\n"}, commit_description="why")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert api.list_repo_files(repo_id) == [".gitattributes"]
    with open(api.hf_hub_download(repo_id, "w.bin", revision="refs/pr/1", cache_dir=tmp_path), "rb") as file:
        assert file.read() == LARGE
    details = api.get_discussion_details(repo_id, 1)
    assert (details.status, details.author, details.conflicting_files) == ("open", "bob", [])
    assert "+++ b/x.txt\n@@ -0,0 +1 @@\n+1\n" in details.diff
    assert "+oid sha256:" in details.diff
    assert [event.type for event in details.events] == ["comment", "commit"]
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.merge_pull_request(repo_id, 1)
    api.merge_pull_request(repo_id, 1, comment="thanks")
    details = api.get_discussion_details(repo_id, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", api.repo_info(repo_id).sha)
    assert "+1\n" in details.diff
    assert set(api.list_repo_files(repo_id)) == {".gitattributes", "w.bin", "x.txt"}
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request(repo_id, 1)


def test_disjoint_pull_requests_both_merge_and_overlapping_ones_conflict(api, bob, repo_id):
    api.upload_file(path_or_fileobj=b"base", path_in_repo="shared.txt", repo_id=repo_id)
    propose(bob, repo_id, {"a.txt": b"a", "shared.txt": b"bob"})
    propose(bob, repo_id, {"b.txt": b"b"})
    propose(bob, repo_id, {"shared.txt": b"other"})
    api.merge_pull_request(repo_id, 1)
    api.merge_pull_request(repo_id, 2)
    assert api.get_discussion_details(repo_id, 3).conflicting_files == ["shared.txt"]
    with pytest.raises(HfHubHTTPError) as refused:
        api.merge_pull_request(repo_id, 3)
    assert refused.value.response.status_code == 409
    assert set(api.list_repo_files(repo_id)) == {".gitattributes", "a.txt", "b.txt", "shared.txt"}


def test_a_pull_request_may_delete_and_grow_until_it_is_closed(api, bob, repo_id):
    api.upload_file(path_or_fileobj=b"1", path_in_repo="old.txt", repo_id=repo_id)
    bob.create_commit(repo_id, [CommitOperationDelete("old.txt")], commit_message="Delete", create_pr=True)
    bob.upload_file(path_or_fileobj=b"2", path_in_repo="new.txt", repo_id=repo_id, revision="refs/pr/1")
    assert bob.list_repo_files(repo_id, revision="refs/pr/1") == [".gitattributes", "new.txt"]
    bob.change_discussion_status(repo_id, 1, "closed")
    with pytest.raises(HfHubHTTPError):
        bob.upload_file(path_or_fileobj=b"3", path_in_repo="new.txt", repo_id=repo_id, revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request(repo_id, 1)
    api.change_discussion_status(repo_id, 1, "open", comment="again")
    api.merge_pull_request(repo_id, 1)
    assert api.list_repo_files(repo_id) == [".gitattributes", "new.txt"]


def test_a_folder_goes_into_a_draft_that_is_opened_before_it_is_merged(api, bob, repo_id, tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "w.bin").write_bytes(LARGE)
    bob.upload_folder(repo_id=repo_id, folder_path=tmp_path / "up", create_pr=True)
    status = api.get_discussion_details(repo_id, 1).status
    if status == "draft":
        with pytest.raises(HfHubHTTPError):
            api.merge_pull_request(repo_id, 1)
        bob.change_discussion_status(repo_id, 1, "open")
    api.merge_pull_request(repo_id, 1)
    assert "w.bin" in api.list_repo_files(repo_id)


def test_people_talk_rename_edit_and_hide(api, bob, repo_id):
    talk = bob.create_discussion(repo_id, "A question", description="How?")
    assert (talk.num, talk.is_pull_request, talk.events[0].content) == (1, False, "How?")
    said = api.comment_discussion(repo_id, 1, "So.")
    edited = api.edit_discussion_comment(repo_id, 1, said.id, "So, really.")
    assert (edited.edited, edited.content) == (True, "So, really.")
    with pytest.raises(HfHubHTTPError):
        bob.edit_discussion_comment(repo_id, 1, said.id, "Not so.")
    with pytest.warns(UserWarning, match="Hiding"):
        assert api.hide_discussion_comment(repo_id, 1, said.id).hidden
    bob.rename_discussion(repo_id, 1, "A better question")
    api.change_discussion_status(repo_id, 1, "closed")
    details = api.get_discussion_details(repo_id, 1)
    assert (details.title, details.status) == ("A better question", "closed")
    assert [event.type for event in details.events] == ["comment", "comment", "title-change", "status-change"]


def test_discussions_are_listed_by_type_state_and_author(api, bob, repo_id):
    bob.create_discussion(repo_id, "A question")
    propose(api, repo_id, {"x.txt": b"1"})
    api.create_pull_request(repo_id, "A draft")
    bob.change_discussion_status(repo_id, 1, "closed")

    def numbers(**filters):
        return [one.num for one in api.get_repo_discussions(repo_id, **filters)]

    assert numbers() == [3, 2, 1]
    assert numbers(discussion_type="pull_request", discussion_status="open") == [3, 2]
    assert numbers(discussion_status="closed") == numbers(author="bob") == [1]
    refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests
    assert [ref.ref for ref in refs] == ["refs/pr/2", "refs/pr/3"]


def test_who_may_not_read_may_not_propose_and_a_strangers_pull_request_is_not_mine(
    api, bob, nobody, reader, hub, repo_id
):
    propose(api, repo_id, {"x.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_file(path_or_fileobj=b"2", path_in_repo="x.txt", repo_id=repo_id, revision="refs/pr/1")
    for other, status in ((nobody, 401), (reader, 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            propose(other, repo_id, {"x.txt": b"2"})
        assert refused.value.response.status_code == status
    api.update_repo_settings(repo_id, private=True)
    for act in (lambda: propose(bob, repo_id, {"x.txt": b"2"}), lambda: bob.get_discussion_details(repo_id, 1)):
        with pytest.raises(HfHubHTTPError) as refused:
            act()
        assert refused.value.response.status_code == 404
