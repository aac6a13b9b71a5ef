"""Every way to load and run a transformers model reaches the card with the CPU's numbers."""

from __future__ import annotations

import multiprocessing
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import quantised_rungs
import safetensors.torch
import torch
import transformers
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from small_bert import IDS, Classifier, logits
from versions import SPREADS_EVENLY

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.budget import vram_budget

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

CONFIG = transformers.BertConfig(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=500,
    max_position_embeddings=32,
)
#: Everything of the model but one layer on the card.
SPLIT: dict[str, Any] = {
    "bert.embeddings": 0,
    "bert.encoder.layer.0": 0,
    "bert.encoder.layer.1": 1,
    "bert.encoder.layer.2": "cpu",
    "bert.encoder.layer.3": 0,
    "bert.pooler": 0,
    "classifier": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model as safetensors, in shards, and as a legacy .bin."""
    folder = tmp_path_factory.mktemp("loads")
    torch.manual_seed(0)
    model = Classifier(CONFIG)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    CONFIG.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.Tensor:
    """The logits of the model on the CPU, before any card is simulated."""
    return logits(Classifier.from_pretrained(folder / "whole"), "cpu")


@pytest.fixture
def machine(reference: torch.Tensor) -> Iterator[SimulatedMachine]:
    """Two cards; the reference was computed without them."""
    assert reference.device.type == "cpu"
    with simulated_device("A100-80GB*2") as machine:
        yield machine


def places(model: Any) -> set[str]:
    """Return where the modules of a model are to run."""
    return {str(place) for place in model.hf_device_map.values()}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("form", ["whole", "shards", "bin"])
def test_every_form_of_checkpoint_loads(
    folder: Path, form: str, reference: torch.Tensor
) -> None:
    """Straight onto a card, with the bytes of the weights."""
    model = Classifier.from_pretrained(folder / form, device_map="cuda:0")

    assert "cuda:0" == str(model.device)
    assert torch.equal(reference, logits(model))
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    assert weights <= torch.cuda.memory_allocated()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("device_map", "where"),
    [
        ("auto", {"0", "1"} if SPREADS_EVENLY else {"0"}),
        ("balanced", {"0", "1"} if SPREADS_EVENLY else {"0"}),
        (SPLIT, {"0", "1", "cpu"}),
        ({**SPLIT, "bert.encoder.layer.3": "disk"}, {"0", "1", "cpu", "disk"}),
    ],
    ids=["auto", "balanced", "dict", "disk"],
)
def test_a_map_spreads_the_model(
    folder: Path,
    tmp_path: Path,
    device_map: Any,
    where: set[str],
    reference: torch.Tensor,
) -> None:
    """Over cards, host and disk; hooks bring what is needed where it is needed."""
    model = Classifier.from_pretrained(
        folder / "whole", device_map=device_map, offload_folder=tmp_path
    )

    assert where == places(model)
    assert torch.equal(reference, logits(model))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("device_map", [1, {"": 1}, "cuda:1", torch.device("cuda", 1)])
def test_a_map_of_one_card_means_that_card(
    folder: Path, device_map: Any, reference: torch.Tensor
) -> None:
    """However it is written."""
    model = Classifier.from_pretrained(folder / "whole", device_map=device_map)

    assert "cuda:1" == str(model.device)
    assert 0 == torch.cuda.memory_allocated(0)
    assert torch.equal(reference, logits(model, "cuda:1"))


@pytest.mark.usefixtures("machine")
def test_sequential_fills_the_first_card_first(
    folder: Path, reference: torch.Tensor
) -> None:
    """All of it, where it fits."""
    model = Classifier.from_pretrained(folder / "whole", device_map="sequential")

    assert "cuda:0" == str(model.device)
    assert 0 == torch.cuda.memory_allocated(1)
    assert torch.equal(reference, logits(model))


@pytest.mark.usefixtures("machine")
def test_max_memory_bounds_each_place(
    folder: Path, tmp_path: Path, reference: torch.Tensor
) -> None:
    """What fits nowhere else goes to the disk."""
    model = Classifier.from_pretrained(
        folder / "whole",
        device_map="auto",
        max_memory={0: "400KB", 1: "200KB", "cpu": "100KB"},
        offload_folder=tmp_path,
    )

    assert {"0", "1", "disk"} <= places(model)
    assert torch.equal(reference, logits(model))


def test_a_budget_is_what_auto_plans_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it, layers go to the host; the peak keeps to it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 16}
    config = {**CONFIG.to_dict(), **sizes}
    torch.manual_seed(0)
    model = Classifier(transformers.BertConfig(**config))
    model.save_pretrained(tmp_path)
    wanted = logits(model, "cpu")
    with simulated_device("A100-80GB"), vram_budget("24MiB"):
        spread = Classifier.from_pretrained(tmp_path, device_map="auto")
        answer = logits(spread)
        peak = torch.cuda.max_memory_reserved()

    assert {"0", "cpu"} == places(spread)
    assert torch.equal(wanted, answer)
    assert 16 * 2**20 < peak <= 24 * 2**20


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_a_type_is_made_on_the_way(
    folder: Path, dtype: Any, reference: torch.Tensor
) -> None:
    """Half of the bytes, nearly the same numbers; "auto" keeps the checkpoint's."""
    model = Classifier.from_pretrained(
        folder / "whole", device_map="cuda:0", dtype=dtype
    )

    assert (torch.float32 if dtype == "auto" else dtype) == model.dtype
    assert torch.allclose(reference, logits(model).float(), atol=2e-2)


@pytest.mark.usefixtures("machine")
def test_empty_weights_are_loaded_and_dispatched(
    folder: Path, reference: torch.Tensor
) -> None:
    """Accelerate's own way to load."""
    with init_empty_weights():
        model = Classifier(CONFIG)
    loaded = load_checkpoint_and_dispatch(model, folder / "whole", device_map=SPLIT)

    assert torch.equal(reference, logits(loaded))


@pytest.mark.usefixtures("machine")
def test_offloading_hooks_leave_nothing_on_the_card(
    folder: Path, tmp_path: Path, reference: torch.Tensor
) -> None:
    """From the host, from the disk, and as a whole with a hook that takes it back."""
    card = torch.device("cuda:0")
    from_host = Classifier.from_pretrained(folder / "whole")
    cpu_offload(from_host, execution_device=card)
    from_disk = Classifier.from_pretrained(folder / "whole")
    disk_offload(from_disk, tmp_path, execution_device=card)
    before = torch.cuda.memory_allocated()
    answers = [logits(from_host), logits(from_disk)]
    workspace = torch.cuda.memory_allocated() - before
    whole, hook = cpu_offload_with_hook(
        Classifier.from_pretrained(folder / "whole"), "cuda:0"
    )
    answers.append(logits(whole))
    hook.offload()

    assert all(torch.equal(reference, answer) for answer in answers)
    assert "cpu" == str(whole.device)
    assert before + workspace == torch.cuda.memory_allocated()


@pytest.mark.usefixtures("machine")
def test_tensors_are_read_onto_a_card(folder: Path, tmp_path: Path) -> None:
    """By safetensors and by torch.load, mapped into memory or not; and written."""
    path = folder / "whole" / "model.safetensors"
    legacy = folder / "bin" / "pytorch_model.bin"
    weights = safetensors.torch.load_file(path, device="cuda:1")
    safetensors.torch.save_file(weights, tmp_path / "copy.safetensors")
    again = safetensors.torch.load_file(tmp_path / "copy.safetensors")
    loads: list[dict[str, torch.Tensor]] = [
        torch.load(legacy, map_location="cuda:1"),
        torch.load(legacy, map_location="cuda:1", mmap=True),
    ]

    for each in (weights, *loads):
        assert {"cuda:1"} == {str(tensor.device) for tensor in each.values()}
        assert all(torch.equal(each[name].cpu(), again[name]) for name in again)


# -- generation --------------------------------------------------------------------------

LLAMA = transformers.LlamaConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=500,
)


def generated(model: Any, device: str, **options: Any) -> torch.Tensor:
    """Return the tokens that a model writes on."""
    tokens: torch.Tensor = model.generate(
        IDS.to(device), max_new_tokens=4, do_sample=False, pad_token_id=0, **options
    )
    return tokens.cpu()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "offloaded_static", "disable_compile": True},
    ],
    ids=["plain", "beams", "offloaded", "static", "offloaded-static"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_writes_the_same_tokens(
    options: dict[str, Any], attention: str
) -> None:
    """With every kind of cache; keys and values are held on the card or off it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "dtype": None})
    model: Any = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    wanted = generated(model, "cpu", num_beams=options.get("num_beams", 1))
    with simulated_device("A100-80GB"):
        tokens = generated(model.cuda(), "cuda", **options)

    assert torch.equal(wanted, tokens)


def test_an_offloaded_cache_holds_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason to choose it: the peak of a long prompt is lower."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 6})
    model: Any = transformers.LlamaForCausalLM(config)
    ids = torch.randint(1, 500, (2, 256))
    peaks = {}
    with simulated_device("A100-80GB"):
        model.cuda()
        for kind in ("dynamic", "offloaded"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model.generate(
                ids.cuda(),
                attention_mask=torch.ones_like(ids).cuda(),
                max_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=kind,
            )
            peaks[kind] = torch.cuda.max_memory_allocated()

    assert peaks["offloaded"] < peaks["dynamic"]


# -- training, pipelines, quantisation ---------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows to train on."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[0], "labels": torch.tensor(index % 2)}


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_trainer_finds_its_batch_size(tmp_path: Path) -> None:
    """An OOM of the first attempts halves the batch until a step fits."""
    torch.manual_seed(0)
    with simulated_device("A100-80GB"), vram_budget("34MiB"):
        model = Classifier(CONFIG)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=64,
                auto_find_batch_size=True,
                max_steps=2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Rows(),
        )
        trainer.train()
        found = trainer._train_batch_size
        retries = torch.cuda.memory_stats()["num_ooms"]

    assert 1 <= found < 64
    assert retries >= 1
    assert 2 == trainer.state.global_step


@pytest.mark.usefixtures("machine")
def test_a_pipeline_of_embeddings_runs_on_the_card(folder: Path) -> None:
    """Feature extraction, as sentence embeddings are made."""
    model: Any = transformers.BertModel.from_pretrained(folder / "whole")
    on_host = model.eval()(IDS).last_hidden_state.mean(dim=1)
    model.to("cuda")
    with torch.no_grad():
        embedded = model(IDS.cuda()).last_hidden_state.mean(dim=1)
        unit = torch.nn.functional.normalize(embedded)

    assert torch.allclose(on_host, embedded.cpu(), atol=1e-6)
    assert torch.allclose(torch.ones(1), unit.norm(dim=1).cpu())


def _check_rung(model: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # OpenMP's are not in a forked process
    quantised_rungs.check("torchao", model)


@pytest.mark.parametrize(
    "model", ["llama", pytest.param("bert-large", marks=pytest.mark.slow)]
)
def test_a_quantised_rung_is_reached(model: str) -> None:
    """int8 weights of torchao where fp32 has no room: the library's values, its bytes.

    In a process of its own: the library registers things with torch for good.
    """
    pytest.importorskip("torchao", reason="the quantisation rung needs torchao")
    process = multiprocessing.get_context("fork").Process(
        target=_check_rung, args=(model,)
    )
    process.start()
    process.join(timeout=600)

    assert 0 == process.exitcode
