"""transformers, peft and lm_eval against the Hub: custom code, pull requests as revisions, adapters, evaluations."""

import json

import pytest

pytest.importorskip("transformers")

CONFIGURATION = """
from transformers import PreTrainedConfig

class TinyConfig(PreTrainedConfig):
    model_type = "tiny_custom"

    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Linear(config.width, 1, bias=False)
        self.post_init()

    def forward(self, x):
        return self.scale(x)
"""
PUSH = """
import sys, torch
sys.path.insert(0, {folder!r})
from tiny.configuration_tiny import TinyConfig
from tiny.modeling_tiny import TinyModel
TinyConfig.register_for_auto_class()
TinyModel.register_for_auto_class("AutoModel")
model = TinyModel(TinyConfig())
for value, options in ((1.0, {{}}), (2.0, {{"create_pr": True}})):
    torch.nn.init.constant_(model.scale.weight, value)
    model.push_to_hub("alice/custom-{name}", **options)

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, GenerationConfig
words = ["<unk>", "<s>", "</s>", "one", "two", "is", "more", "less", "than", "yes", "no"]
raw = Tokenizer(models.WordLevel({{word: n for n, word in enumerate(words)}}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64))
base.push_to_hub("alice/base-{name}")
tokenizer.push_to_hub("alice/base-{name}")
GenerationConfig(max_new_tokens=7).push_to_hub("alice/base-{name}")

from peft import LoraConfig, get_peft_model
base = LlamaForCausalLM.from_pretrained("alice/base-{name}")
lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
adapted = get_peft_model(base, lora)
adapted.push_to_hub("alice/adapter-{name}")
torch.save(adapted.eval()(torch.arange(5)[None]).logits, {folder!r} + "/logits.pt")
"""
USE = """
import json, sys, torch, transformers, peft
from huggingface_hub import HfApi
x = torch.ones(1, 4)
found = {{}}
for revision in ("main", "refs/pr/1"):
    model = transformers.AutoModel.from_pretrained("alice/custom-{name}", trust_remote_code=True, revision=revision)
    found[revision] = float(model(x))
HfApi().merge_pull_request("alice/custom-{name}", 1)
model = transformers.AutoModel.from_pretrained("alice/custom-{name}", trust_remote_code=True)
found["merged"] = float(model(x))
tokenizer = transformers.AutoTokenizer.from_pretrained("alice/base-{name}")
found["tokens"] = tokenizer("one is more").input_ids
found["new"] = transformers.GenerationConfig.from_pretrained("alice/base-{name}").max_new_tokens
adapted = peft.AutoPeftModelForCausalLM.from_pretrained("alice/adapter-{name}").eval()
expected = torch.load({folder!r} + "/logits.pt")
found["adapter"] = torch.allclose(adapted(torch.arange(5)[None]).logits, expected)
found["base"] = adapted.peft_config["default"].base_model_name_or_path
found["files"] = sorted(HfApi().list_repo_files("alice/custom-{name}"))
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", *{evaluate!r}]
cli_evaluate()
print(json.dumps(found))
"""
TASK = """
task: compare
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module", params=[False, True], ids=["http", "xet"])
def xet(request):
    """Whether large files go by Xet."""
    return request.param


@pytest.fixture(scope="module")
def pushed(hub, xet, tmp_path_factory):
    """The name after which the pushed repos are called, and the folder with their code."""
    folder, name = tmp_path_factory.mktemp("code"), f"pushed-{xet}"
    (folder / "tiny").mkdir()
    (folder / "tiny" / "__init__.py").touch()
    (folder / "tiny" / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "tiny" / "modeling_tiny.py").write_text(MODELING)
    hub.run_python(PUSH.format(folder=str(folder), name=name), xet=xet)
    return name, folder


@pytest.fixture(scope="module")
def used(hub, xet, pushed):
    """What a user of the pushed repos found, who also evaluated one of them."""
    pytest.importorskip("peft")
    pytest.importorskip("lm_eval")
    name, folder = pushed
    rows = [{"text": "one is more than two", "label": 1}, {"text": "one is less than two", "label": 0}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "compare.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")))
    where = f"hub_results_org=alice,details_repo_name=details-{name},results_repo_name=results-{name}"
    what = "push_results_to_hub=True,push_samples_to_hub=True,public_repo=True"
    evaluate = ["run", "--model", "hf", "--model_args", f"pretrained=alice/base-{name}", "--tasks", "compare"]
    evaluate += [
        "--include_path",
        str(folder),
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(folder / "out"),
    ]
    evaluate += ["--hf_hub_log_args", f"{where},{what}"]
    return json.loads(
        hub.run_python(USE.format(name=name, folder=str(folder), evaluate=evaluate), xet=xet).splitlines()[-1]
    )


def test_custom_code_is_loaded_from_main_and_from_a_pull_request_before_and_after_it_is_merged(used):
    assert (used["main"], used["refs/pr/1"], used["merged"]) == (4, 8, 8)
    assert {"configuration_tiny.py", "modeling_tiny.py", "config.json", "model.safetensors"} <= {*used["files"]}


def test_a_tokenizer_a_generation_config_and_an_adapter_with_its_base_are_loaded(used, pushed):
    assert (used["tokens"], used["new"]) == ([3, 5, 6], 7)
    assert (used["adapter"], used["base"]) == (True, f"alice/base-{pushed[0]}")


def test_lm_eval_evaluates_a_pushed_model_and_pushes_its_results_and_samples(hub, used, pushed, tmp_path):
    from huggingface_hub import HfApi

    name, api = pushed[0], HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    files = api.list_repo_files(f"alice/results-{name}", repo_type="dataset")
    (result,) = [path for path in files if path.endswith(".json")]
    local = api.hf_hub_download(f"alice/results-{name}", result, repo_type="dataset", local_dir=tmp_path)
    with open(local) as file:
        assert 0 <= json.load(file)["results"]["compare"]["acc,none"] <= 1
    samples = api.list_repo_files(f"alice/details-{name}", repo_type="dataset")
    assert any("samples_compare" in path for path in samples)
