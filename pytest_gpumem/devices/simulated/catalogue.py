"""How the simulated device treats each public name of ``torch.cuda`` and similar modules.

A page of the documentation is generated from this table. The tests check that each name
that the installed torch exports is in the table, and that each name that the table calls
refused is refused.
"""

from __future__ import annotations

from typing import Final

from pytest_gpumem.devices.simulated.refusals import ADVICE

#: The meaning of each kind, in the order of the documentation's page.
KINDS: Final[dict[str, str]] = {
    "exact": (
        "the figures of PyTorch's own allocator, to the byte, compared with recordings"
    ),
    "like a card": "behaves as on a real card; values are computed by the CPU",
    "modelled": "a plausible answer, consistent with the card's other answers",
    "constant": "always the same answer, or no effect",
    "refused": "raises UnsupportedOnSimulatedDeviceError, which says what to do",
}

_CUDA: Final[dict[str, str]] = {
    "exact": """
        MemPool caching_allocator_alloc caching_allocator_delete empty_cache get_allocator_backend get_per_process_memory_fraction
        max_memory_allocated max_memory_cached max_memory_reserved memory_allocated
        memory_cached memory_reserved memory_snapshot memory_stats
        memory_stats_as_nested_dict memory_summary reset_accumulated_memory_stats
        reset_max_memory_allocated reset_max_memory_cached reset_peak_memory_stats
        set_per_process_memory_fraction use_mem_pool
    """,
    "like a card": """
        BFloat16Tensor BoolTensor ByteTensor CharTensor DoubleTensor FloatTensor
        HalfTensor IntTensor LongTensor ShortTensor
        CUDAGraph CudaError DeferredCudaCallError Event Stream StreamContext amp
        current_device current_stream default_generators default_stream device
        device_count device_of export_dot export_graph_data get_rng_state get_rng_state_all init initial_seed
        graph graph_pool_handle graphs ipc_collect is_available is_current_stream_capturing
        is_initialized make_graphed_callables manual_seed manual_seed_all memory random seed
        nccl seed_all set_device set_rng_state set_rng_state_all set_stream stream streams
        synchronize check_error cudaStatus
        BFloat16Storage BoolStorage ByteStorage CharStorage ComplexDoubleStorage
        ComplexFloatStorage DoubleStorage FloatStorage HalfStorage IntStorage
        LongStorage ShortStorage
    """,
    "modelled": """
        can_device_access_peer cudart device_memory_used get_arch_list
        get_device_capability get_device_name get_device_properties get_gencode_flags
        is_bf16_supported is_tf32_supported list_gpu_processes mem_get_info
    """,
    "constant": """
        caching_allocator_enable current_blas_handle current_solver_handle get_sync_debug_mode
        graph_annotations has_half
        has_magma host_memory_stats host_memory_stats_as_nested_dict
        memory_usage nvtx profiler
        reset_accumulated_host_memory_stats reset_peak_host_memory_stats
        set_sync_debug_mode sparse utilization temperature power_draw clock_rate
    """,
    "refused": """
        CUDAPluggableAllocator ExternalStream GreenContext
        caching_allocator_disabled change_current_allocator get_stream_from_external
        jiterator tunable
    """,
}

_ACCELERATOR: Final[dict[str, str]] = {
    "exact": """
        empty_cache max_memory_allocated max_memory_reserved memory_allocated
        memory_reserved memory_stats reset_accumulated_memory_stats
        reset_peak_memory_stats
    """,
    "like a card": """
        current_accelerator current_device_idx current_device_index current_stream
        device_count device_index is_available set_device_idx set_device_index
        set_stream synchronize get_device_capability
    """,
    "modelled": "get_memory_info",
    "constant": "empty_host_cache",
    "refused": "Graph",
}

#: Additional notes on names.
NOTES: Final[dict[str, str]] = {
    "torch.cuda.temperature": "NVML's own “Not Supported”",
    "torch.cuda.power_draw": "NVML's own “Not Supported”",
    "torch.cuda.clock_rate": "NVML's own “Not Supported”",
    "torch.cuda.utilization": "0: nothing is computed on the card",
    "torch.cuda.memory_usage": "0: nothing is computed on the card",
    "torch.cuda.host_memory_stats": "0: pinned memory is ordinary memory",
    "torch.cuda.mem_get_info": "free memory is at most the rest of the budget",
    "torch.cuda.get_arch_list": "the architectures of the simulated machine's cards",
    "torch.cuda.memory_snapshot": (
        "with `_record_memory_history` also each change and its Python frames; "
        "`_dump_snapshot` writes what memory_viz opens"
    ),
    "torch.cuda.Stream": (
        "work is finished when a call returns; the allocator keeps blocks by stream"
    ),
    "torch.cuda.export_dot": "a hook for CUDA's own graphs, which do not exist here",
    "torch.cuda.export_graph_data": (
        "a hook for CUDA's own graphs, which do not exist here"
    ),
    "torch.cuda.CUDAGraph": (
        "captures allocate from a private pool; a replay computes again on the same "
        "memory; `debug_dump`, `raw_cuda_graph`, `check_input_liveness` are refused"
    ),
    "torch.cuda.caching_allocator_alloc": (
        "the bytes are allocated on the card, but there is no memory at the address"
    ),
    "torch.cuda.caching_allocator_enable": "`False` is refused",
    "torch.cuda.MemPool": "an `allocator=` is refused",
    "torch.cuda.nvtx": "ranges are counted, but no profiler shows them",
    "torch.cuda.nccl": "`unique_id` and `init_rank` are refused",
    "torch.cuda.tunable": "`is_enabled` returns False",
}

#: Names outside ``torch.cuda`` and ``torch.accelerator``, by kind.
BEYOND: Final[dict[str, tuple[str, ...]]] = {
    "exact": (
        "`torch.OutOfMemoryError`: class, argument and text, cache flushed first, "
        "`num_ooms` counted, observers called",
        "`PYTORCH_ALLOC_CONF`, `PYTORCH_CUDA_ALLOC_CONF`: every setting; "
        "`torch.cuda.memory._set_allocator_settings` while a program runs",
        "private pools of graphs and of `MemPool`: routes, shared pools, the time when "
        "memory is freed, `use_on_oom`, `no_split`, statistics of each pool, the text of "
        "an OOM; compared step by step with a recording of PyTorch's own code",
        "`Tensor.record_stream`: a freed block waits for the other stream",
        "cuBLAS's workspace, by compute capability and `CUBLAS_WORKSPACE_CONFIG`",
    ),
    "like a card": (
        "`.to`, `.cuda`, `.cpu`, `.type`, `.data =`, `.item`, `.tolist`, printing, "
        "pickling, `torch.save`, `torch.load`, `deepcopy`, weak references; "
        "`isinstance(x, torch.Tensor)` is true, but `type(x) is torch.Tensor` is false: "
        "C++ searches an object's class for the device's Python code; if "
        "`torch.Tensor` had this code, every host tensor would be slower",
        "tensors of a class without `__torch_dispatch__` (like torchvision's "
        "`tv_tensors`, MONAI's `MetaTensor`, subclasses of `nn.Parameter`): if they are "
        "made on a card or moved there, they keep their class and the attributes that "
        "`__torch_function__` gives them",
        "wrapper subclasses (torchao, optimum-quanto, `DTensor`, jagged nested "
        "tensors): they can wrap a card's tensors, or be moved to a card",
        "classes with `__torch_dispatch__` and memory of their own: operators that they "
        "call through `super()` run on the card; inside "
        "`torch._C._DisableTorchDispatch` their operators raise torch's "
        "`NotImplementedError`",
        "`.numpy()` and operands on two devices: torch's own errors",
        "failed assertions of a card's kernel (an index or a target out of bounds, an "
        "invalid probability): `CUDA error: device-side assert triggered`, with the "
        "reason in a note. It is "
        "raised at once, as under `CUDA_LAUNCH_BLOCKING=1`, and unlike a card, the "
        "simulated card stays usable",
        "`torch.device(0)`, `with torch.device('cuda')`, `torch.set_default_device`; where "
        "torch is not built for CUDA, `type(device) is torch.device` is False, and "
        "`isinstance` and `==` work",
        "generators: seed, offset and state; an allocation that fails draws no numbers; "
        "the numbers are the CPU's",
        "`torch.autocast` and `torch.amp.GradScaler`, fp16 and bf16",
        "optimisers, foreach and fused; `torch.utils.checkpoint`",
        "captures of graphs: forbidden operations raise CUDA's or torch's error (`item`, "
        "`synchronize`, copies of memory that is not pinned, an unknown generator); "
        "streams join by events. As on a card, a capture changes no existing memory "
        "and draws no numbers; a graph can read the results that an earlier graph left "
        "in their common pool. Not "
        "simulated: if two graphs use the same memory, a "
        "replay of one does not overwrite the other's tensors. A seed that Python drew "
        "for attention's dropout stays the same in each replay",
        "`torch.func`, forward AD and batched gradients: transforms see moves of tensors "
        "between devices",
        "`torch.inference_mode`: the bytes of `torch.no_grad`",
        "operators of `torch.library.custom_op`: their Python code sees the card",
        "`torch.nn.DataParallel` over several simulated cards",
        "quantised weights: bitsandbytes (8 and 4 bits), torchao, optimum-quanto and hqq, "
        "also loaded by `quantization_config` and under peft's adapters: values are those "
        "of the libraries' own code for the CPU, and the bytes are those of the quantised "
        "storages",
        "`torch.distributed` with [NCCL](nccl.md), started in any way: gloo carries the "
        "values, with NCCL's rules, errors and work objects; also DDP, FSDP, "
        "`fully_shard`, `DTensor` and `ZeroRedundancyOptimizer`. [Its "
        "bytes](nccl.md#bytes) include DDP's buckets, shards and gathered parameters",
        "`torch.compile` with any backend and mode: code that uses a card's tensors runs "
        "without compilation, with the values and bytes of eager code. If a backend would "
        "make kernels, one warning says so, or an error with `--gpu-compiled=refused`; "
        "graph breaks are not detected",
        "`torch.cond` and other operators that take functions (`while_loop`, `scan`, "
        "`map`): they run as their eager code, with its bytes",
        "threads, DataLoader workers, autograd's threads; a forked child of a process "
        "that has used a card gets torch's own error if it uses the card, and computes "
        "on the host with one thread",
        "tensors, modules and events sent to other processes (CUDA IPC), by queues and "
        "pipes of `torch.multiprocessing` (spawn, forkserver) or by `reduce_tensor`: each "
        "process sees what another writes. The bytes count for the sender. They are "
        "freed when every receiver has deleted its tensor and the sender then deletes "
        "another sent tensor, calls `torch.cuda.ipc_collect`, or finds no free block. "
        "A receiver holds only the bytes of its context. The values move to shared "
        "memory of the host (`/dev/shm`), so that "
        "`data_ptr()` changes when a tensor is first sent. If the sender ends first, "
        "receivers keep the values, which on a card is undefined",
        "`CUDA_VISIBLE_DEVICES`, read when CUDA is first used in a process: hides, "
        "chooses and orders the simulated cards, by number, UUID or name of a "
        "[slice (MIG)](cards.md#slices-mig)",
        "[cards without memory of their own](cards.md#cards-without-memory-of-their-own) "
        "(GB10, Jetson): the host's bytes are not free for the card, and NVML gives no "
        "memory",
        "pinned memory: tensors say that they are pinned, also those in memory that "
        "`torch.cuda.cudart().cudaHostRegister` has registered",
        "TorchScript: scripted and traced functions and modules run and move; errors "
        "of operators, OOMs too, are the interpreter's RuntimeError; "
        "`torch.jit.save` and `torch.jit.load` with `map_location`, for modules on one "
        "device",
        "`torch.version.cuda`, `torch.backends.cuda.is_built()`, "
        "`torch.backends.cudnn.version()`: a build for CUDA 13.0, unless the installed "
        "one is for CUDA itself",
    ),
    "modelled": (
        "attention, dropout, reductions, sums of gradients: the tensors that CUDA's "
        "kernels save, and the temporary memory that they request",
        "`pynvml`, the functions of `torch.cuda` that use it, and "
        "[`nvidia-smi`](children.md): no real driver is asked; also for slices (MIG), and "
        "for [programs that read cards](third-party.md) (GPUtil, gpustat, nvitop, py3nvml)",
        "`torch.backends.cuda.preferred_linalg_library`, `preferred_blas_library` and "
        "`cufft_plan_cache`: stored and reported; operators make the requests of "
        "torch's default choice, and no plan of cuFFT is kept",
        "`torch.profiler` times the host; with `profile_memory=True` it reports the "
        "memory of values as host memory, and one warning says so",
        "[injected errors](rules.md) of CUDA, cuBLAS, cuDNN, cuFFT, cuSOLVER, NCCL, Triton "
        "and CuPy: class and text of the real error, with the card's figures",
        "the memory of an NCCL communicator outside PyTorch's allocator: 0, or the bytes "
        "that the card's `nccl=` gives",
        "cuDNN's convolutions: they request their results, and 0 bytes of workspace, "
        "because the size of cuDNN's workspace is not known. PyTorch's own requests "
        "are exact: with `benchmark=True` it empties the allocator's cache after the "
        "first "
        "convolution of each kind, and each first gradient; with `deterministic=True` it "
        "takes its own kernels for dilated convolutions, which make columns. The "
        "workspaces that cuDNN tries with `benchmark=True`, up to the card's free memory, "
        "are not simulated",
        "cuDNN's attention: it runs if no other kernel is allowed or if "
        "`sdpa_kernel(set_priority=True)` puts it first; torch itself puts it first on "
        "cards of compute capability 9.0 and 10.0, which is not simulated. It requests "
        "its result, one float for each row, two integers, and 0 bytes of workspace, "
        "because the size of cuDNN's workspace is not known",
        "cuDNN's recurrent layers: their requests are those of the steps that the CPU "
        "computes. Not simulated are cuDNN's reserve space, which it keeps for backward, "
        "its workspace, and the one buffer that the weights are joined into "
        "(`flatten_parameters`). `torch.backends.cudnn.is_acceptable` is False",
    ),
}


def kinds_of_names(module: str) -> dict[str, str]:
    """Return the kind of each public name of ``torch.cuda`` or ``torch.accelerator``."""
    table = {"torch.cuda": _CUDA, "torch.accelerator": _ACCELERATOR}[module]
    return {name: kind for kind in KINDS for name in table[kind].split()}


def note_of(name: str) -> str:
    """Return the note on a name, such as ``torch.cuda.nccl``."""
    return NOTES.get(name, ADVICE.get(name, ""))
