"""Models served under their hub names: what the libraries that ask the hub get."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants, file_download
from small_bert import Classifier, small_config
from versions import TRANSFORMERS

from pytest_gpumem import serve_models
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.hub.names import HubModel, hub_model, parse_hub_model
from pytest_gpumem.hub.service import Service
from pytest_gpumem.inheritance import HUB_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

transformers_auto: Any = transformers
Auto: Any = transformers_auto.AutoModelForSequenceClassification
AutoTokenizer: Any = transformers_auto.AutoTokenizer
hub: Any = huggingface_hub
_API = sys.modules["huggingface_hub.hf_api"].HfApi
try:
    import httpx2
except ImportError:  # before huggingface_hub 1.0
    import requests

    CLIENT: Any = requests.Session
    TRANSPORT: Any = (requests.adapters.HTTPAdapter, "send")
else:
    CLIENT, TRANSPORT = httpx2.Client, (httpx2.HTTPTransport, "handle_request")
SHA = "6da4b6a26a1877e173fca3225479512db81a5e5b"


@pytest.fixture(params=["offline", "online"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's library in its offline mode, and out of it; never any network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")

    def refuse(*_arguments: Any) -> None:
        raise AssertionError("the network was asked")

    owner, name = TRANSPORT
    monkeypatch.setattr(owner, name, refuse)
    return str(request.param)


@pytest.fixture(autouse=True)
def _cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_GPUMEM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config.json of a small BERT."""
    small_config().save_pretrained(tmp_path)
    return tmp_path / "config.json"


def differing(left: Any, right: Any) -> list[str]:
    """Return the names of weights that two models do not share, bit for bit."""
    mine, others = left.state_dict(), right.state_dict()
    assert mine.keys() == others.keys()
    return [name for name in mine if not torch.equal(mine[name], others[name])]


# -- names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("bert-large-uncased", HubModel("bert-large-uncased", "bert-large", (), True)),
        (
            "google-bert/bert-base-uncased=bert-tiny",
            HubModel("google-bert/bert-base-uncased", "bert-tiny"),
        ),
        ("gpt2=hub", HubModel("gpt2", "hub")),
        (
            "bert-tiny, format=bin,seed=3",
            HubModel("bert-tiny", "bert-tiny", (("format", "bin"), ("seed", 3)), False),
        ),
        (
            "a/b=bert-tiny,max_shard_size=4MB",
            HubModel("a/b", "bert-tiny", (("max_shard_size", "4MB"),)),
        ),
    ],
)
def test_a_model_is_named_in_one_text(text: str, model: HubModel) -> None:
    """The name, what it is built from, and how; a name that is known is enough."""
    assert model == parse_hub_model(text)
    assert model == HubModel.from_json(json.loads(json.dumps(model.to_json())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nobody/knows", "no known model has this name; say what to build it from"),
        ("two--dashes=bert-tiny", "this is not a name on the hub"),
        ("a/b/c=bert-tiny", "this is not a name on the hub"),
        ("a/b=missing", "neither a known name nor a config.json"),
        ("bert-tiny,format=onnx", "format='onnx' is not known"),
        ("bert-tiny,seed=x", "seed='x' is not a whole number"),
        ("bert-tiny,max_shard_size=x", "cannot be read"),
        ("bert-tiny,colour=red", "this is not a name on the hub"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    """Before anything is built."""
    with pytest.raises(CheckpointError, match=message):
        parse_hub_model(text)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        (
            "bert-large-uncased",
            [
                "google-bert/bert-large-uncased",
                "sentence-transformers/bert-large-uncased",
                "cross-encoder/bert-large-uncased",
            ],
        ),
        ("google-bert/bert-large-uncased", ["bert-large-uncased"]),
        ("openai-community/gpt2", ["gpt2"]),
        ("FacebookAI/roberta-base", ["roberta-base"]),
        ("my-org/bert-large-uncased", []),
        ("mine", ["sentence-transformers/mine", "cross-encoder/mine"]),
    ],
)
def test_a_model_has_its_old_name_and_its_new_one(name: str, others: list[str]) -> None:
    """The hub answers to both, where it has moved a model to an organisation."""
    assert (name, *others) == hub_model(name, "bert-tiny").names


# -- what libraries get -----------------------------------------------------------------


def test_transformers_loads_by_name(mode: str, config: Path) -> None:
    """Model, config, tokenizer and pipeline, under either name, at any revision."""
    with serve_models({"bert-mini": config}):
        model = Auto.from_pretrained("bert-mini")
        other = Auto.from_pretrained(
            "google-bert/bert-mini", dtype="auto", device_map="cpu", revision=SHA
        )
        pinned = Auto.from_pretrained(
            "bert-mini", revision="refs/pr/1", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained("bert-mini")
        read = transformers_auto.AutoConfig.from_pretrained("bert-mini")
        # transformers 4 reads the mode once, when it is imported.
        is_told = mode == "offline" or TRANSFORMERS < 5
        task = "text-classification" if is_told else None
        answer = transformers_auto.pipeline(task, model="bert-mini")("a few words")

    assert type(model) is Classifier
    assert [] == differing(model, other)
    assert [] == differing(model, pinned)
    assert 16 == read.hidden_size
    assert (100, 16) == (len(tokenizer), tokenizer.model_max_length)
    assert {"label", "score"} == set(answer[0])


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, ["model.safetensors"]),
        ({"format": "bin"}, ["pytorch_model.bin"]),
        (
            {"max_shard_size": "12kB"},
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        (
            {"format": "bin", "max_shard_size": "12kB"},
            [
                "pytorch_model-00001-of-00002.bin",
                "pytorch_model-00002-of-00002.bin",
                "pytorch_model.bin.index.json",
            ],
        ),
    ],
)
def test_either_format_whole_and_in_shards(
    mode: str, config: Path, options: dict[str, Any], files: list[str]
) -> None:
    """The files are those of a published model of that format; all load the same."""
    with serve_models({"my-org/mine": config}, **options):
        folder = Path(hub.snapshot_download("my-org/mine"))
        listed = sorted(each.name for each in folder.iterdir())
        loaded = Auto.from_pretrained("my-org/mine")
    with serve_models({"my-org/mine": config}):
        plain = Auto.from_pretrained("my-org/mine")

    others = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted([*others, *files]) == listed
    assert [] == differing(plain, loaded)
    assert mode


def test_the_legacy_format_is_there_once_it_is_asked_for(
    mode: str, config: Path
) -> None:
    """A model that nobody asked for in one format has both, as most published ones."""
    with serve_models({"bert-mini": config}):
        new = Auto.from_pretrained("bert-mini")
        assert not hub.try_to_load_from_cache("bert-mini", "pytorch_model.bin")
        old = Auto.from_pretrained("bert-mini", use_safetensors=False)
        assert hub.try_to_load_from_cache("bert-mini", "pytorch_model.bin")

    assert [] == differing(new, old)
    assert mode


def test_a_generating_model_has_its_generation_config(mode: str) -> None:
    """And answers a text with a text."""
    with serve_models({"my-org/gpt": "gpt2-tiny"}):
        model = transformers_auto.AutoModelForCausalLM.from_pretrained("my-org/gpt")
        tokenizer = AutoTokenizer.from_pretrained("my-org/gpt")
        given = tokenizer("Once upon a time", return_tensors="pt")
        made = model.generate(**given, max_new_tokens=3, do_sample=False)
        file = hub.hf_hub_download("my-org/gpt", "generation_config.json")
        entries = json.loads(Path(file).read_text(encoding="utf-8"))

    assert 0 == entries["eos_token_id"]
    assert tokenizer.decode(made[0]).startswith("Once upon a time")
    assert mode


def test_the_trainer_trains(mode: str, config: Path, tmp_path: Path) -> None:
    """With the tokenizer to measure."""
    with serve_models({"bert-mini": config}):
        tokenizer = AutoTokenizer.from_pretrained("bert-mini")
        given = tokenizer(["a b", "c d"], padding="max_length", max_length=8)
        rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for label, (ids, mask) in enumerate(
                zip(given["input_ids"], given["attention_mask"], strict=True)
            )
        ]
        trainer = transformers_auto.Trainer(
            Auto.from_pretrained("bert-mini"),
            transformers_auto.TrainingArguments(
                tmp_path / "out", max_steps=1, report_to=[], use_cpu=True, save_steps=1
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()

    assert 1 == trainer.state.global_step
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").is_file()
    assert mode


def test_the_hubs_own_functions(mode: str, config: Path, tmp_path: Path) -> None:
    """Files, folders, listings and information; each revision is the same."""
    name = "google-bert/bert-mini"
    with serve_models({name: config}):
        folder = Path(hub.snapshot_download(name))
        api = hub.HfApi()
        listed = sorted(each.name for each in folder.iterdir())
        tree = [each.path for each in api.list_repo_tree(name)]
        information = api.model_info(name, files_metadata=True)
        file = hub.hf_hub_download(name, "config.json", revision="v1.0")
        at_commit = hub.snapshot_download(name, revision=SHA, local_files_only=True)
        here = hub.snapshot_download(name, local_dir=tmp_path / "copy")
        forced = hub.hf_hub_download(name, "model.safetensors", force_download=True)
        entries = json.loads(Path(file).read_text(encoding="utf-8"))

        assert listed == tree == api.list_repo_files(name)
        assert listed == sorted(each.rfilename for each in information.siblings)
        assert folder.name == information.sha == Path(file).parent.name
        assert folder.resolve() == Path(at_commit).resolve()
        assert "text-classification" == information.pipeline_tag
        assert Path(here, "model.safetensors").is_file()
        assert (
            Path(forced).stat().st_size == (folder / "model.safetensors").stat().st_size
        )
        assert 16 == entries["hidden_size"]
        assert api.file_exists(name, "config.json")
        assert not api.file_exists(name, "nothing.json")
        assert ["main"] == [each.name for each in api.list_repo_refs(name).branches]
        assert ["config.json"] == [
            each.path for each in api.get_paths_info(name, ["config.json", "no"])
        ]
        files = hub.HfFileSystem(skip_instance_cache=True)
        with files.open(f"{name}/model.safetensors", block_size=64) as stream:
            stream.seek(8)
            assert b'{"__metadata__"' == stream.read(15)
        with pytest.raises(hub.errors.EntryNotFoundError):
            hub.hf_hub_download(name, "modules.json", subfolder=".")
        with pytest.raises(hub.errors.HfHubHTTPError, match="served by pytest-gpumem"):
            api.create_branch(name, branch="mine")
    assert mode


def test_nothing_is_copied(config: Path) -> None:
    """The folder is laid out as the hub's cache is, of links to the checkpoint."""
    with serve_models({"my-org/mine": config}):
        weights = Path(hub.hf_hub_download("my-org/mine", "model.safetensors"))
        repository = weights.parents[2]
        names = sorted(each.name for each in repository.iterdir())
        ref = (repository / "refs" / "main").read_text(encoding="utf-8")

        assert "models--my-org--mine" == repository.name
        assert ["blobs", "refs", "snapshots"] == names
        assert ref == weights.parent.name
        assert weights.parent.parent == repository / "snapshots"
        assert weights.is_symlink()
        cache = Path(os.environ["PYTEST_GPUMEM_CACHE"])
        assert weights.resolve().is_relative_to(cache.resolve())

    assert not repository.exists()
    assert 1 == len(list(cache.glob(f"*/{weights.name}")))


def test_a_checkpoint_of_ones_own_is_served_as_it_is(tmp_path: Path) -> None:
    """Its weights, and its own tokenizer, if it has one."""
    torch.manual_seed(1)
    mine = Classifier(small_config())
    mine.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "vocab.txt").write_text("[UNK]\nmy\nword\n", encoding="utf-8")

    with serve_models({"my-org/mine": tmp_path / "mine"}):
        served = Auto.from_pretrained("my-org/mine")
        files = hub.list_repo_files("my-org/mine")

    assert [] == differing(mine, served)
    assert ["config.json", "model.safetensors", "vocab.txt"] == files
    with pytest.raises(CheckpointError, match="is served as it is"):
        hub_model("my-org/mine", tmp_path / "mine", {"seed": 1})


def test_a_tokenizer_beside_the_config_is_taken(config: Path) -> None:
    """Only a model without one gets one that is made to measure."""
    (config.parent / "vocab.txt").write_text("[UNK]\nmy\nword\n", encoding="utf-8")

    with serve_models({"my-org/mine": config.parent}):
        files = hub.list_repo_files("my-org/mine")

    assert ["config.json", "model.safetensors", "vocab.txt"] == files


# -- the tokenizer ------------------------------------------------------------------------


TEXT = "The quick brown fox jumps over the lazy dog; it's 3,142 miles - 日本, naïve!"
KINDS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(vocab_size=30522),
    "small": lambda: transformers.BertConfig(vocab_size=99),
    "distilbert": transformers.DistilBertConfig,
    "roberta": lambda: transformers.RobertaConfig(max_position_embeddings=514),
    "gpt2": transformers.GPT2Config,
    "few": lambda: transformers.GPT2Config(
        vocab_size=120, bos_token_id=1, eos_token_id=1
    ),
    "llama": lambda: transformers.LlamaConfig(vocab_size=32000),
    "qwen2": lambda: transformers.Qwen2Config(vocab_size=3000),
    "t5": transformers.T5Config,
    "opt": transformers.OPTConfig,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_has_the_models_size(kind: str, tmp_path: Path) -> None:
    """Any text becomes numbers below the vocabulary's size, always the same ones."""
    from pytest_gpumem.hub.tokenizer import write_tokenizer

    config = KINDS[kind]()
    config.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    assert write_tokenizer(tmp_path, entries, name=kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    ids = tokenizer(TEXT)["input_ids"]

    assert config.vocab_size == len(tokenizer)
    assert max(ids) < config.vocab_size
    if (
        kind != "few" or TRANSFORMERS >= 5
    ):  # without fast code, 4 splits what is unknown
        assert ids == again(TEXT)["input_ids"]
    assert len(ids) > len(TEXT.split())
    if kind not in ("small", "few"):
        assert len(ids) < len(TEXT)
    if kind == "roberta":
        assert (0, 2, 512) == (ids[0], ids[-1], tokenizer.model_max_length)
    if kind in ("gpt2", "llama", "opt", "t5"):
        assert TEXT == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_model_without_words_has_no_tokenizer(tmp_path: Path) -> None:
    """Images are not tokenized."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
    )
    config.save_pretrained(tmp_path)

    with serve_models({"my-org/vit": tmp_path}):
        files = hub.list_repo_files("my-org/vit")

    assert ["config.json", "model.safetensors"] == files


# -- whose model it is ----------------------------------------------------------------------


def test_the_users_own_copy_comes_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a source is named; and the source hub means the hub's own always."""
    torch.manual_seed(2)
    cache = tmp_path / "hub"
    commit = cache / "models--bert-tiny-uncased" / "snapshots" / SHA
    Classifier(small_config()).save_pretrained(commit)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(SHA, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    name = "bert-tiny-uncased"

    with serve_models(name):
        own = Path(hub.snapshot_download(name, local_files_only=True))
        with serve_models({name: config}):
            ours = Path(hub.snapshot_download(name, local_files_only=True))
            with serve_models(f"{name}=hub"):
                again = Path(hub.snapshot_download(name, local_files_only=True))

    assert commit == own == again
    assert not ours.exists()
    assert commit != ours


def test_a_cache_named_in_the_call_stays_empty(config: Path, tmp_path: Path) -> None:
    """A served model never comes to be in a cache of the user's."""
    with serve_models({"my-org/mine": config}):
        Auto.from_pretrained("my-org/mine", cache_dir=tmp_path / "cache")
        hub.snapshot_download("my-org/mine", cache_dir=tmp_path / "cache")

    assert not list(tmp_path.glob("cache/models*"))


def test_a_model_that_nobody_serves_says_what_to_do(config: Path) -> None:
    """One sentence more; the class, the cause and the rest of the text stay."""
    with pytest.raises(OSError, match="couldn't connect") as plain:
        Auto.from_pretrained("nobody/it")
    with (
        pytest.raises(OSError, match="--gpu-hub-model=nobody/it=SOURCE") as told,
        serve_models({"my-org/mine": config}),
    ):
        Auto.from_pretrained("nobody/it")
    with (
        pytest.raises(OSError, match=r"give --gpu-hub-model=bert-large-uncased, "),
        serve_models({"my-org/mine": config}),
    ):
        hub.hf_hub_download("bert-large-uncased", "config.json")
    with (
        pytest.raises(OSError, match=r"^mine$") as other,
        serve_models({"my-org/mine": config}),
    ):
        raise OSError("mine")

    assert type(plain.value) is type(told.value)
    assert str(told.value).startswith(str(plain.value))
    assert type(plain.value.__cause__) is type(told.value.__cause__)
    assert ("mine",) == other.value.args


def test_a_head_of_another_size_says_what_to_do(config: Path) -> None:
    """Served without a head, a model takes any."""
    with (
        pytest.raises(RuntimeError, match="my-org/mine,architecture=AutoModel") as told,
        serve_models({"my-org/mine": config}),
    ):
        Auto.from_pretrained("my-org/mine", num_labels=5)
    with serve_models({"my-org/mine": config}, architecture="AutoModel"):
        model = Auto.from_pretrained("my-org/mine", num_labels=5)

    assert "mismatch" in str(told.value)
    assert 5 == model.classifier.out_features


def test_names_that_differ_in_case_share_no_folder(config: Path) -> None:
    """Nor do they where the file system knows no case."""
    with serve_models({"my-org/mine": config, "My-Org/Mine": "gpt2-tiny"}):
        one, other = (
            hub.snapshot_download(each) for each in ("my-org/mine", "My-Org/Mine")
        )

    assert one.casefold() != other.casefold()


def test_a_forked_child_leaves_the_folder_to_its_parent(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the block too, while its parent is still in it."""
    service = Service()
    service.push([hub_model("my-org/mine", config)])
    root = Path(os.environ[HUB_VARIABLE]).parent
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        service.pop()

    assert root.is_dir()
    shutil.rmtree(root)


def test_what_a_killed_run_left_goes_with_the_next(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a week: a younger folder may be in use."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age_s in (("old", 8 * 86400), ("young", 6 * 86400)):
        folder = tmp_path / f"gpumem-hub-{name}"
        folder.mkdir()
        then = time.time() - age_s
        os.utime(folder, (then, then))

    with serve_models({"my-org/mine": config}):
        pass

    assert ["gpumem-hub-young"] == [each.name for each in tmp_path.glob("gpumem-*")]


def test_nothing_is_left_behind(config: Path) -> None:
    """Functions, environment and folders are as before, whatever happened."""
    before = (
        file_download.repo_folder_name,
        huggingface_hub.snapshot_download,
        getattr(_API, "resolve_revision", None),
        CLIENT.send,
    )

    def break_off() -> None:
        with serve_models({"my-org/mine": config}):
            root = Path(os.environ[HUB_VARIABLE]).parent
            hub.snapshot_download("my-org/mine")
            with serve_models({"my-org/other": config}):
                hub.snapshot_download("my-org/other")
                hub.snapshot_download("my-org/mine")
            with pytest.raises(OSError, match="disk"):
                hub.snapshot_download("my-org/other")
            assert root.exists()
            raise ZeroDivisionError(root)

    with pytest.raises(ZeroDivisionError) as left:
        break_off()

    assert HUB_VARIABLE not in os.environ
    assert not left.value.args[0].exists()
    assert before == (
        file_download.repo_folder_name,
        huggingface_hub.snapshot_download,
        getattr(_API, "resolve_revision", None),
        CLIENT.send,
    )
