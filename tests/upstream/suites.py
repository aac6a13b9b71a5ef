"""Which tests of which released sources run, and which cannot."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Suite:
    """Tests of one project.

    Attributes:
        name: What the table calls it.
        distribution: Its name in the package index.
        version: The release, or that of the checkout whose figures the docs have.
        files: The files of tests, seen from ``folder``.
        sha256: Of the release's source archive, where that has the tests.
        is_released: Whether the release's source archive has the tests. Those of the
            others need a checkout of the project.
        folder: Where pytest starts, seen from the source.
        paths: Folders of the source that Python looks into for modules.
        packages: Folders to which the archive lacks ``__init__.py``.
        stand_ins: Modules that the archive lacks and the tests import or are, with
            what stands in for them.
        every: Of files with a thousand tests and more, one in so many is run.
        keyword: pytest's ``-k``.
        ignores: A warning that the suite would make an error, as pytest's ``-W`` has it.
        environment: Variables that the tests want.
        is_alone: Whether each test has a process of its own, because it starts the
            command of that process again for its other ranks.
    """

    name: str
    distribution: str
    version: str
    files: tuple[str, ...]
    sha256: str = ""
    is_released: bool = True
    folder: str = "."
    paths: tuple[str, ...] = (".",)
    packages: tuple[str, ...] = ()
    stand_ins: dict[str, str] = field(default_factory=dict)
    every: int = 1
    keyword: str = ""
    ignores: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    is_alone: bool = False

    def prepare(self, home: Path) -> None:
        """Put what the archive lacks into the unpacked source."""
        for each in self.packages:
            (home / each).mkdir(parents=True, exist_ok=True)
            (home / each / "__init__.py").touch()
        for name, text in self.stand_ins.items():
            (home / name).write_text(text, encoding="utf-8")


def _tests(*names: str, under: str = "tests") -> tuple[str, ...]:
    return tuple(f"{under}/{each}.py" for each in names)


#: Files with tests that need two cards, but for those of DeepSpeed.
LIGHTNING: Final = (
    "callbacks/progress/test_tqdm_progress_bar.py",
    "callbacks/test_pruning.py",
    "callbacks/test_stochastic_weight_avg.py",
    "callbacks/test_weight_averaging.py",
    "checkpointing/test_checkpoint_callback_frequency.py",
    "checkpointing/test_torch_saving.py",
    "core/test_metric_result_integration.py",
    "models/test_amp.py",
    "models/test_gpu.py",
    "models/test_hooks.py",
    "models/test_restore.py",
    "plugins/precision/test_double.py",
    "plugins/test_amp_plugins.py",
    "profilers/test_profiler.py",
    "strategies/launchers/test_subprocess_script.py",
    "strategies/test_common.py",
    "strategies/test_ddp.py",
    "strategies/test_ddp_integration.py",
    "strategies/test_ddp_integration_comm_hook.py",
    "strategies/test_fsdp.py",
    "strategies/test_model_parallel_integration.py",
    "trainer/connectors/test_accelerator_connector.py",
    "trainer/logging_/test_distributed_logging.py",
    "trainer/logging_/test_train_loop_logging.py",
    "trainer/optimization/test_manual_optimization.py",
    "trainer/optimization/test_optimizers.py",
    "trainer/test_dataloaders.py",
    "trainer/test_trainer.py",
    "utilities/test_all_gather_grad.py",
    "utilities/test_combined_loader.py",
    "utilities/test_dtype_device_mixin.py",
)

#: Lightning's own scripts run two kinds apart, too: tests for cards, in one process, and
#: tests that start their command again for each rank.
_LIGHTNING_CUDA: Final = Suite(
    "Lightning, CUDA tests",
    "pytorch-lightning",
    "2.6.2",
    LIGHTNING,
    is_released=False,
    folder="tests/tests_pytorch",
    paths=("tests", "src"),
    environment={"RUN_ONLY_CUDA_TESTS": "1"},
)

SUITES: Final = (
    Suite(
        "accelerate",
        "accelerate",
        "1.15.0",
        # Not: test_cli and test_examples, whose configurations and examples the archive
        # lacks, and what has nothing to do with a card.
        _tests(
            "test_accelerator",
            "test_activation_checkpointing_offload",
            "test_big_modeling",
            "test_compile",
            "test_cpu",
            "test_data_loader",
            "test_fp8",
            "test_grad_sync",
            "test_hooks",
            "test_kwargs_handlers",
            "test_load_checkpoint_and_dispatch_with_broadcast",
            "test_memory_utils",
            "test_metrics",
            "test_modeling_utils",
            "test_multidevice",
            "test_offload",
            "test_optimizer",
            "test_quantization",
            "test_scheduler",
            "test_state_checkpointing",
            "test_utils",
        ),
        sha256="5654f8c5eaa0d4fa68b33e287a97765da6849bf6d51dcac874e73fbbddfb6134",
    ),
    Suite(
        "peft",
        "peft",
        "0.21.0",
        _tests(
            "test_common_gpu",
            "test_custom_models",
            "test_gpu_examples",
            "test_initialization",
            "test_lora_variants",
            "test_low_level_api",
            "test_mixed",
            "test_other",
            "test_quantization",
            "test_randlora",
            "test_tuners_utils",
            "test_vblora",
            "test_vera",
        ),
        sha256="17f2b5a264439f4cd983c02e95954f2e948e3bcb85f75895ee307f94a55fd28f",
        packages=("tests",),
        every=40,
    ),
    Suite(
        "transformers",
        "transformers",
        "5.23.0",
        ("tests/test_common_models.py",),
        sha256="19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
        packages=("tests", "tests/exporters", "tests/generation"),
        stand_ins={
            "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
            "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
            "tests/test_common_models.py": "from common_models import *\n",
        },
    ),
    Suite(
        "diffusers",
        "diffusers",
        "0.40.0.dev0",
        (
            *_tests("test_group_offloading", "test_hooks", under="tests/hooks"),
            "tests/models/unets/test_models_unet_2d_condition.py",
        ),
        is_released=False,
        paths=(".", "src"),
    ),
    Suite(
        "Lightning",
        "pytorch-lightning",
        "2.6.2",
        (
            "accelerators/test_gpu.py",
            "callbacks/test_device_stats_monitor.py",
            "callbacks/test_pruning.py",
            "callbacks/test_weight_averaging.py",
            "models/test_amp.py",
            "models/test_gpu.py",
            "plugins/precision/test_amp_integration.py",
            "strategies/test_ddp.py",
            "strategies/test_single_device.py",
            "trainer/connectors/test_accelerator_connector.py",
            "trainer/optimization/test_manual_optimization.py",
            "tuner/test_scale_batch_size.py",
            "utilities/test_dtype_device_mixin.py",
            "utilities/test_model_summary.py",
        ),
        is_released=False,
        folder="tests/tests_pytorch",
        # Those that start processes of their own take most of the time.
        keyword="not spawn and not fork and not ddp",
        paths=("tests", "src"),
    ),
    Suite(
        "peft, several cards",
        "peft",
        "0.21.0",
        _tests("test_common_gpu", "test_gpu_examples"),
        sha256="17f2b5a264439f4cd983c02e95954f2e948e3bcb85f75895ee307f94a55fd28f",
        packages=("tests",),
        keyword="multi_gpu or multi_accelerator",
    ),
    Suite(
        "diffusers, several cards",
        "diffusers",
        "0.40.0.dev0",
        (
            "tests/models/test_attention_dispatch.py",
            "tests/models/transformers/test_models_transformer_flux.py",
            "tests/models/transformers/test_models_transformer_flux2.py",
            "tests/models/transformers/test_models_transformer_qwenimage.py",
            "tests/models/unets/test_models_unet_2d_condition.py",
        ),
        is_released=False,
        paths=(".", "src"),
        keyword="Parallel or parallelism",
    ),
    _LIGHTNING_CUDA,
    replace(
        _LIGHTNING_CUDA,
        name="Lightning, standalone tests",
        # torch 2.13 deprecates what this release of Lightning calls.
        ignores="ignore:torch.distributed.nn.functional.all_gather is:FutureWarning",
        environment={"PL_RUN_STANDALONE_TESTS": "1"},
        is_alone=True,
    ),
)
