"""Commits, downloads and listings through the unmodified client, over HTTP and over hf_xet."""

import threading

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

# The client's own way to send a large file over HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

LARGE = bytes(range(256)) * 8000  # 2 MB that chunks and compresses


def test_a_small_and_a_large_file_come_back_as_they_were(api, repo_id, tmp_path):
    api.upload_file(path_or_fileobj=b"hello", path_in_repo="a/b.txt", repo_id=repo_id)
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="model.safetensors", repo_id=repo_id)
    for path, content in [("a/b.txt", b"hello"), ("model.safetensors", LARGE)]:
        local = api.hf_hub_download(repo_id, path, cache_dir=tmp_path)
        with open(local, "rb") as file:
            assert file.read() == content
    assert api.file_exists(repo_id, "a/b.txt")
    assert not api.file_exists(repo_id, "a/c.txt")


def test_an_uploaded_file_object_and_an_empty_file(api, repo_id, tmp_path):
    (tmp_path / "x.bin").write_bytes(LARGE[:100_000])
    with open(tmp_path / "x.bin", "rb") as file:
        api.upload_file(path_or_fileobj=file, path_in_repo="x.bin", repo_id=repo_id)
    api.upload_file(path_or_fileobj=b"", path_in_repo="empty.bin", repo_id=repo_id)
    sizes = {file.path: file.size for file in api.list_repo_tree(repo_id)}
    assert (sizes["x.bin"], sizes["empty.bin"]) == (100_000, 0)


def test_a_folder_goes_up_and_a_snapshot_comes_down(api, repo_id, tmp_path):
    folder = tmp_path / "folder"
    for number in range(40):
        path = folder / f"part{number % 4}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {number}")
    (folder / "w.bin").write_bytes(LARGE)
    api.upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo="sub", delete_patterns="*.old")
    local = api.snapshot_download(repo_id, cache_dir=tmp_path / "cache")
    found = {path.relative_to(local).as_posix() for path in (tmp_path / "cache").rglob("*") if local in str(path)}
    assert {f"sub/part{n % 4}/{n}.txt" for n in range(40)} | {"sub/w.bin"} <= found
    only = api.snapshot_download(repo_id, allow_patterns="*.bin", local_dir=tmp_path / "only")
    assert (tmp_path / "only" / "sub" / "w.bin").read_bytes() == LARGE, only


def test_one_commit_adds_copies_and_deletes(api, repo_id):
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="a.bin", repo_id=repo_id)
    api.upload_file(path_or_fileobj=b"text", path_in_repo="old/b.txt", repo_id=repo_id)
    operations = [
        CommitOperationCopy("a.bin", "copy.bin"),
        CommitOperationCopy("old/b.txt", "copy.txt"),
        CommitOperationDelete("a.bin"),
        CommitOperationDelete("old/"),
        CommitOperationAdd("new.txt", b"new"),
    ]
    info = api.create_commit(repo_id, operations, commit_message="All", commit_description="at once")
    assert set(api.list_repo_files(repo_id)) == {".gitattributes", "copy.bin", "copy.txt", "new.txt"}
    commit = api.list_repo_commits(repo_id)[0]
    assert (commit.commit_id, commit.title, commit.message) == (info.oid, "All", "at once")


def test_a_large_file_is_copied_from_another_repo_without_being_sent(api, repo_id, transfer, tmp_path):
    if transfer == "http":
        pytest.skip("the client copies between repos only what came by Xet")
    source = api.create_repo(f"{repo_id}-source").repo_id
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="a.bin", repo_id=source)
    copy = CommitOperationCopy("a.bin", "b.bin", src_repo_id=source, src_repo_type="model")
    api.create_commit(repo_id, [copy], commit_message="copy")
    with open(api.hf_hub_download(repo_id, "b.bin", cache_dir=tmp_path), "rb") as file:
        assert file.read() == LARGE


def test_files_and_folders_are_deleted(api, repo_id):
    for path in ("a/x.txt", "a/y.txt", "z.txt"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo=path, repo_id=repo_id)
    api.delete_file("z.txt", repo_id)
    api.delete_folder("a", repo_id)
    assert api.list_repo_files(repo_id) == [".gitattributes"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("missing.txt", repo_id)


def test_the_tree_is_listed_flat_deep_and_expanded(api, repo_id):
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a/b/c.txt", repo_id=repo_id, commit_message="Add c")
    assert [entry.path for entry in api.list_repo_tree(repo_id)] == [".gitattributes", "a"]
    assert [entry.path for entry in api.list_repo_tree(repo_id, "a/b")] == ["a/b/c.txt"]
    entries = {entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True, expand=True)}
    assert entries["a/b/c.txt"].last_commit.title == entries["a"].last_commit.title == "Add c"
    assert entries[".gitattributes"].last_commit.title == "initial commit"
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo_id, "missing"))


def test_a_long_tree_comes_in_pages(api, repo_id):
    operations = [CommitOperationAdd(f"{number:04}.txt", b"1") for number in range(1005)]
    api.create_commit(repo_id, operations, commit_message="many")
    assert len(list(api.list_repo_tree(repo_id))) == 1006


def test_paths_info_tells_files_from_folders_and_leaves_out_the_unknown(api, repo_id):
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="a/x.bin", repo_id=repo_id)
    folder, file = api.get_paths_info(repo_id, ["a", "a/x.bin", "missing"], expand=True)
    assert (folder.path, file.size, file.lfs.size) == ("a", len(LARGE), len(LARGE))


def test_an_old_revision_keeps_its_files(api, repo_id, tmp_path):
    old = api.upload_file(path_or_fileobj=b"old", path_in_repo="x.txt", repo_id=repo_id).oid
    api.upload_file(path_or_fileobj=b"new", path_in_repo="x.txt", repo_id=repo_id)
    with open(api.hf_hub_download(repo_id, "x.txt", revision=old, cache_dir=tmp_path)) as file:
        assert file.read() == "old"
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repo_id, "x.txt", revision="missing", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo_id, "missing.txt", cache_dir=tmp_path)


def test_branches_tags_and_squash(api, repo_id):
    first = api.list_repo_commits(repo_id)[0].commit_id
    api.create_branch(repo_id, branch="feature/x")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x.txt", repo_id=repo_id, revision="feature/x")
    api.create_tag(repo_id, tag="v1", revision="feature/x", tag_message="one")
    api.create_tag(repo_id, tag="v0", revision=first)
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    assert {branch.name for branch in refs.branches} == {"main", "feature/x"}
    tip = next(branch.target_commit for branch in refs.branches if branch.name == "feature/x")
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v0": first, "v1": tip}
    assert api.list_repo_files(repo_id, revision="v1") == [".gitattributes", "x.txt"]
    api.create_branch(repo_id, branch="feature/x", exist_ok=True)
    api.delete_tag(repo_id, tag="v0")
    api.super_squash_history(repo_id, branch="feature/x")
    assert len(api.list_repo_commits(repo_id, revision="feature/x")) == 1
    api.delete_branch(repo_id, branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo_id, revision="feature/x")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(repo_id, branch="main")


def test_a_folder_is_deleted_by_its_bare_path_and_a_pull_request_can_be_squashed(api, repo_id):
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a/x.txt", repo_id=repo_id)
    operation = CommitOperationDelete("a", is_folder=False)
    change = api.create_commit(repo_id, [operation], commit_message="Delete", create_pr=True)
    assert api.list_repo_files(repo_id, revision=change.pr_revision) == [".gitattributes"]
    api.super_squash_history(repo_id, branch=change.pr_revision)
    assert len(api.list_repo_commits(repo_id, revision=change.pr_revision)) == 1
    with pytest.raises(RevisionNotFoundError):
        api.super_squash_history(repo_id, branch="missing")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(repo_id, tag="not a tag", revision="missing")


def test_a_stale_parent_is_412_and_a_fresh_one_goes_through(api, repo_id):
    parent = api.repo_info(repo_id).sha
    add = [CommitOperationAdd("x.txt", b"1")]
    api.create_commit(repo_id, add, commit_message="one", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(repo_id, [CommitOperationAdd("y.txt", b"1")], commit_message="two", parent_commit=parent)
    assert refused.value.response.status_code == 412


def test_concurrent_commits_are_each_applied_or_refused(api, repo_id):
    applied, refused = [], []

    def work(worker):
        for number in range(5):
            try:
                add = [CommitOperationAdd(f"{worker}/{number}.txt", b"1")]
                api.create_commit(repo_id, add, commit_message=f"{worker}/{number}")
                applied.append(f"{worker}/{number}.txt")
            except HfHubHTTPError as error:
                refused.append(error.response.status_code)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(api.list_repo_files(repo_id)) == {".gitattributes", *applied}
    assert len(api.list_repo_commits(repo_id)) == 1 + len(applied)
    assert set(refused) <= {409, 412}


def test_uploading_the_same_file_again_makes_no_commit(api, repo_id):
    first = api.upload_file(path_or_fileobj=LARGE, path_in_repo="x.bin", repo_id=repo_id)
    again = api.upload_file(path_or_fileobj=LARGE, path_in_repo="x.bin", repo_id=repo_id)
    assert first.oid == again.oid


def test_a_path_that_escapes_is_refused(api, repo_id):
    operation = CommitOperationAdd("x.txt", b"1")
    operation.path_in_repo = ".git/hooks/post-update"
    with pytest.raises(HfHubHTTPError, match="422"):
        api.create_commit(repo_id, [operation], commit_message="escape")


def test_the_file_system_reads_ranges_writes_and_lists(api, hub, repo_id):
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="dir/x.bin", repo_id=repo_id)
    system = HfFileSystem(endpoint=hub.url, token=hub.tokens["alice"])
    with system.open(f"{repo_id}/dir/x.bin", "rb", block_size=1000) as file:
        file.seek(300_000)
        assert file.read(10) == LARGE[300_000:300_010]
    with system.open(f"{repo_id}/dir/new.txt", "w") as file:
        file.write("written")
    assert system.cat(f"{repo_id}/dir/new.txt") == b"written"
    assert system.exists(f"{repo_id}/dir")
    assert not system.exists(f"{repo_id}/nothing")
    assert [name.rpartition("/")[2] for name in system.ls(f"{repo_id}/dir", detail=False, refresh=True)] == [
        "new.txt",
        "x.bin",
    ]
    system.rm(f"{repo_id}/dir/new.txt")
    system.invalidate_cache()
    assert len(system.glob(f"{repo_id}/**/*.bin")) == 1


def test_the_file_system_copies_moves_writes_and_removes_files(api, hub, repo_id, tmp_path, transfer):
    system = HfFileSystem(endpoint=hub.url, token=hub.tokens["alice"], skip_instance_cache=True)
    (tmp_path / "local.bin").write_bytes(LARGE)
    system.put(str(tmp_path / "local.bin"), f"{repo_id}/a/local.bin")
    system.get(f"{repo_id}/a/local.bin", str(tmp_path / "back.bin"))
    assert (tmp_path / "back.bin").read_bytes() == LARGE
    system.pipe({f"{repo_id}/t/1.txt": b"1", f"{repo_id}/t/2.txt": b"2"})
    system.cp_file(f"{repo_id}/t/1.txt", f"{repo_id}/t/3.txt")
    if transfer == "xet":  # the client copies on the Hub only what came by Xet
        system.cp_file(f"{repo_id}/a/local.bin", f"{repo_id}/a/copy.bin")
        assert system.info(f"{repo_id}/a/copy.bin")["size"] == len(LARGE)
    assert system.cat([f"{repo_id}/t/{number}.txt" for number in (1, 2, 3)]) == {
        f"{repo_id}/t/1.txt": b"1",
        f"{repo_id}/t/2.txt": b"2",
        f"{repo_id}/t/3.txt": b"1",
    }
    assert {path.rpartition("/")[2] for path in system.find(f"{repo_id}/t")} == {"1.txt", "2.txt", "3.txt"}
    assert system.isdir(f"{repo_id}/t")
    assert system.du(f"{repo_id}/t") == 3
    system.mv(f"{repo_id}/t/3.txt", f"{repo_id}/moved.txt")
    assert system.cat(f"{repo_id}/moved.txt") == b"1"
    commit = system.info(f"{repo_id}/t/1.txt", expand_info=True)["last_commit"].oid
    system.rm(f"{repo_id}/t", recursive=True)
    assert not system.exists(f"{repo_id}/t/1.txt", refresh=True)
    assert system.cat(f"{repo_id}@{commit}/t/1.txt") == b"1"
