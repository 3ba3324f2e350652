"""Hostile contributions are refused with the reason, before anything of them is loaded."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from hub_moe.collaboration.safety import check_listing, open_contribution
from hub_moe.hub.file_checks import find_scripts, find_secrets
from hub_moe.hub.marks import ContributionMark, ReviewMark, read_mark, write_mark
from hub_moe.hub.pull_requests import Listed, Proposal, fetch_pull_request, parse_reference, read_bytes, read_proposal
from hub_moe.patches.tensor_file import hash_file

from .proposals import copy

pytestmark = [
    pytest.mark.slow,  # models are made and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
NAMES = ("expert_patch.json", "expert_patch.safetensors", "config.json")


@pytest.fixture(scope="module")
def base(world, tiny_tokenizer):
    from tests.anatomy.families import tiny_config

    return world.publish_base("safety-base", tiny_config("hub_moe"), tiny_tokenizer)


@pytest.fixture(scope="module")
def honest(world, base):
    return world.make_patch(*base, "law", {1: [0, 3]}, with_records=False)


def listing(*paths, existing=(), deleted=(), size=10):
    files = {path: Listed(path, size, "new") for path in paths}
    return Proposal("0" * 40, tuple(files.values()), deleted, {p: Listed(p, 1, "old") for p in existing}, len(files))


def good(name="law"):
    return [f"patches/{name}/{each}" for each in NAMES]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("patches/law/weights.bin", "may be a pickle"),
        ("patches/law/Model.PKL", "may be a pickle"),
        ("patches/law/modeling_evil.py", "is code"),
        ("patches/law/setup.sh", "is code"),
        ("patches/law/evals/run.ipynb", "is code"),
        ("patches/law/notes.docx", "is no file that belongs"),
        ("patches/law/more.safetensors", "is no file that belongs"),
        ("patches/law/picture.svg", "is no file that belongs"),
        ("patches/law/../../config.json", "leads elsewhere"),
        ("patches/law/.git/config", "leads elsewhere"),
        ("patches/law/a\\b.json", "control characters or backslashes"),
        ("patches/law/a\u202egnp.png", "control characters or backslashes"),
        ("patches/law/-rf.json", "take for an option"),
        ("patches/law/" + "x" * 250 + ".png", "too long"),
        ("config.json", "lies outside of patches/NAME"),
        ("README.md", "lies outside of patches/NAME"),
        (".eval_results/a.yaml", "lies outside of patches/NAME"),
        ("patches/other/expert_patch.json", "it holds 2 patches"),
        ("patches/law/readme.md", "differs from another file by its case only"),
    ],
)
def test_a_name_alone_may_be_reason_enough(path, reason):
    name, faults = check_listing(listing(*good(), "patches/law/README.md", path))
    assert name == "law"
    assert [str(each) for each in faults if reason in str(each)] != []


def test_an_honest_listing_has_no_fault():
    files = ["README.md", "evals/offline-0123456789abcdef.json", "evals/offline-0.parquet", "heat.png"]
    assert check_listing(listing(*good(), *(f"patches/law/{name}" for name in files))) == ("law", [])


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        (listing(), "it changes nothing"),
        (listing(*good(), deleted=("model.safetensors",)), "takes away a file of the base"),
        (listing(*good("-x")), "is none for a patch"),
        (listing(*good(), existing=good()), "is there already"),
        (listing(*good()[:2]), "lacks config.json"),
        (listing(*good(), size=200_000_000), "are allowed"),
        (listing(*good(), *(f"patches/law/{n}.png" for n in range(300))), "303 files"),
        (listing(*good(), *(f"junk/{n}" for n in range(20_000))), "more than 20,000 files"),
    ],
)
def test_what_a_pull_request_may_not_do_as_a_whole(proposal, reason):
    assert reason in " ".join(map(str, check_listing(proposal)[1]))


def edit(folder, change):
    path = folder / "expert_patch.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def rewrite_weights(folder, data):
    (folder / "expert_patch.safetensors").write_bytes(data)
    edit(folder, lambda fields: fields["weights"].update(sha256=hash_file(folder / "expert_patch.safetensors")))


def with_header(folder, change):
    data = (folder / "expert_patch.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    rewrite_weights(folder, struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(header):
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def claim_more(header):
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] *= 1000


def poison(folder):
    path = folder / "expert_patch.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    edit(folder, lambda fields: fields["weights"].update(sha256=hash_file(path)))


def flip_a_bit(folder):
    data = bytearray((folder / "expert_patch.safetensors").read_bytes())
    data[-1] ^= 1
    rewrite_weights(folder, bytes(data))


def rebase(folder, **changes):
    edit(folder, lambda fields: fields["base"].update(changes))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = {"repo": "base_model", "commit": "base_model_commit"}
    config |= {names[key]: value for key, value in changes.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


HOSTILE = {
    "overlapping offsets": (lambda f: with_header(f, overlap), "overlaps another"),
    "shape beyond the file": (lambda f: with_header(f, claim_more), "does not fill"),
    "nested header": (lambda f: with_header(f, lambda header: b"[" * 50_000), "not sound JSON"),
    "huge header": (
        lambda f: rewrite_weights(f, struct.pack("<Q", 1 << 62) + (f / "expert_patch.safetensors").read_bytes()[8:]),
        "claims a header of",
    ),
    "much more data": (
        lambda f: rewrite_weights(f, (f / "expert_patch.safetensors").read_bytes() + bytes(17_000_000)),
        "the tensors that expert_patch.json declares have",
    ),
    "other weights": (
        lambda f: (f / "expert_patch.safetensors").write_bytes(
            (f / "expert_patch.safetensors").read_bytes()[:-4] + b"\0" * 4
        ),
        "has another sha256",
    ),
    "mis-hashed tensor": (flip_a_bit, "sha256 of the tensor differs"),
    "nan": (poison, "holds NaN or infinity"),
    "undeclared expert": (
        lambda f: edit(f, lambda fields: fields["experts"].update({"1": [0]})),
        "which the patch does not list",
    ),
    "declares a giant": (
        lambda f: edit(f, lambda fields: next(iter(fields["tensors"].values())).update(shape=[10**6, 10**6])),
        "far more than the base has",
    ),
    "another base": (lambda f: rebase(f, repo="mallory/base"), "is for another base: mallory/base"),
    "config of another base": (
        lambda f: edit(f, lambda fields: fields["base"].update(repo="mallory/base")),
        "is not the config",
    ),
    "remote code in the config": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "auto_map": {"AutoConfig": "evil.Config"}})
        ),
        "is not the config",
    ),
    "script in the card": (
        lambda f: (f / "README.md").write_text("# Hi\n<script>steal()</script>"),
        "holds what a page could run or load: </script, <script",
    ),
    "a pickle that is called a picture": (
        lambda f: (f / "change.png").write_bytes(b"\x80\x04K\x01."),
        "is no picture, whatever its name says",
    ),
    "nested metadata": (lambda f: (f / "expert_patch.json").write_text('{"a":' * 5000), "not valid JSON"),
    "another tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is not the base's"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_contribution_is_refused_before_it_is_loaded(world, base, honest, tmp_path, how):
    spoil, reason = HOSTILE[how]
    folder = copy(honest, tmp_path / "patch")
    repo, _ = base
    spoil(folder)
    has_metadata = how not in ("nested metadata", "undeclared expert")
    number = world.propose(repo, folder, "law", mark_of=folder if has_metadata else honest)
    pull_request = fetch_pull_request(world.alice, repo, number)
    contribution, faults = open_contribution(world.alice, pull_request, read_proposal(world.alice, pull_request))
    assert contribution is None
    assert [str(each) for each in faults if reason in str(each)] != [], [str(each) for each in faults]
    assert not any(str(tmp_path) in str(each) for each in faults)


def test_a_base_commit_that_is_not_of_main_would_load_what_the_author_wrote(world, base, honest, tmp_path):
    repo, _ = base
    first = world.propose(repo, honest, "trojan")
    head = fetch_pull_request(world.alice, repo, first).head
    folder = copy(honest, tmp_path / "patch")
    rebase(folder, commit=head)
    pull_request = fetch_pull_request(world.alice, repo, world.propose(repo, folder, "law"))
    _, faults = open_contribution(world.alice, pull_request, read_proposal(world.alice, pull_request))
    assert "which is none of main's" in str(faults[0])


def test_ten_thousand_files_are_refused_by_their_number(world, base, honest, run):
    repo, _ = base
    extra = {f"patches/law/pictures/{n}.png": b"" for n in range(10_000)}
    number = world.propose(repo, honest, "law", extra=extra)
    code, out, err = run("review", f"{repo}#{number}", "--no-post")
    assert code == 1, err
    assert "REJECT" in out
    assert "10,004 files" in out


def test_no_more_of_a_file_crosses_the_network_than_asked_for(world, base):
    repo, commit = base
    assert len(read_bytes(world.alice, repo, "model.safetensors", revision=commit, count=8)) == 8
    assert read_bytes(world.alice, repo, "README.md", revision="main", count=10**6).startswith(b"---")


@pytest.mark.parametrize(
    "text",
    [
        "<script>x</script>",
        "< SCRIPT src=x>",
        "[a](javascript:alert(1))",
        '<img src="x" onerror="y()">',
        "<iframe src=x>",
        "<a href='data:text/html,x'>y</a>",
        "<img/src=x/onerror=alert(1)>",
        "<details/open/ontoggle=alert(1)>",
        '<img src="x>" onerror=alert(1)>',
        "<!--><img src=x onerror=alert(1)>-->",
        "[a](jav&#x61;script:alert(1))",
        "[a](java\tscript:alert(1))",
        "[a]: java\nscript:alert(1)",
        "<a href=' jAvAsCrIpT&colon;alert(1)'>y</a>",
        "<javascript:alert(1)>",
        "&lt;b onclick=x&gt;",
    ],
)
def test_what_a_page_could_run_is_found_in_a_card(text):
    assert find_scripts(f"# Card\n\n{text}\n") != []


def test_plain_words_are_no_script():
    assert find_scripts("One < two, on = off; a <b>bold</b> word. `x<y` turns on the light=bright.") == []
    assert find_scripts("<b>Languages</b> once = 2, online=True, one=1. Python: 45.2, JavaScript: 40.1, R: 12 %.") == []
    assert find_scripts("See [data](https://a.org/data:text) <https://a.org/?q=javascript> and `only=1`.") == []


@pytest.mark.parametrize("token", ["hf_" + "aB" * 17, "hf_aBc-dE_fGhIjKlMnOpQrStUvWxYz0123456789"])
def test_tokens_are_found_in_texts_and_names_of_functions_are_not(token):
    assert find_secrets(f"export HF_TOKEN={token}\n") == ["a token of a Hub"]
    assert find_secrets("call hf_hub_download_with_progress_and_retries(), not HF_HUB_ENABLE_HF_TRANSFER_x") == []


def test_tokens_of_the_embedded_hub_are_found_in_texts(hub):
    assert all(find_secrets(f"token {token}") for token in hub.tokens.values())


def test_looking_for_scripts_takes_no_long_time_on_hostile_text():
    assert find_scripts("<" * 500_000 + " on") == []
    assert find_scripts("<a " * 200_000) == []
    assert find_scripts("<!" * 200_000 + '<a "' * 100_000) == []


def test_marks_are_read_as_written_and_nothing_else_is():
    mark = ReviewMark("0" * 40, "reject", ["--> <script>", "b"], {"id": "failed"}, "n", ["task"])
    text = f"Words.\n\n{write_mark(mark)}"
    assert text.count("-->") == 1
    read = read_mark(ReviewMark, text)
    assert (read.verdict, list(read.reasons), read.records) == ("reject", ["--> <script>", "b"], {"id": "failed"})
    for damaged in (
        text + " more",
        text.replace('"reject"', '"great"'),
        text.replace('"nonce"', '"once"'),
        text.replace('"format_version": 1', '"format_version": 2'),
        text.replace("hub_moe:review", "hub_moe:contribution"),
        "<!-- hub_moe:review " + '{"a":' * 3000 + " -->",
    ):
        assert read_mark(ReviewMark, damaged) is None
    assert read_mark(ContributionMark, text) is None


def test_a_mark_from_before_there_was_a_tolerance_is_read_and_one_without_reads_there():
    assert "tolerance" not in write_mark(ReviewMark("0" * 40, "accept"))
    assert read_mark(ReviewMark, write_mark(ReviewMark("0" * 40, "accept"))).tolerance == 0
    text = write_mark(ReviewMark("0" * 40, "accept", tolerance=0.02))
    assert read_mark(ReviewMark, text).tolerance == 0.02
    for hostile in ('"much"', "1" + "0" * 400, "null", "[0.02]"):
        assert read_mark(ReviewMark, text.replace("0.02", hostile)) is None


@pytest.mark.parametrize("reference", ["alice/base", "alice/base#0", "alice/base#x", "alice#3", "../x#1", "a/b#1#2"])
def test_what_is_no_pull_request_is_told(reference):
    with pytest.raises(ValueError, match="expected OWNER/NAME#NUMBER"):
        parse_reference(reference)
