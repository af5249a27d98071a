"""Compile Triton launches without a GPU: record a launch, specialise it as the JIT would, read its resource usage.

A launch inside `recorded()` with CPU tensors does not run; it is recorded with its arguments. `compile_launch` then
builds the machine code that a GPU of the named architecture would run for these arguments. No driver is needed.
"""

import contextlib
import functools
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_compiled = {}  # (architecture, kernel, specialisation) -> CompiledKernel


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)` call."""

    kernel: JITFunction
    grid: tuple[int, int, int]
    arguments: dict  # name -> value, in the order of the signature, defaults filled in
    options: dict = field(default_factory=dict)  # num_warps, num_stages and so on, as passed

    @property
    def name(self):
        return self.kernel.__name__


@contextlib.contextmanager
def redirect_launches(receive):
    """Call `receive(Launch)` for each Triton launch inside the block instead of running it."""

    def run(kernel, *args, grid, warmup, **kwargs):
        if not warmup:
            receive(make_launch(kernel, grid, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def recorded():
    """Record Triton launches inside the block in the yielded list of `Launch`, without running them."""
    launches = []
    with redirect_launches(launches.append):
        yield launches


def make_launch(kernel, grid, args, kwargs):
    """The `Launch` that `kernel[grid](*args, **kwargs)` would make."""
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    names = set(kernel.arg_names)
    bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    grid = tuple(grid(arguments) if callable(grid) else grid)
    options = {name: value for name, value in kwargs.items() if name not in names}
    return Launch(kernel, grid + (1,) * (3 - len(grid)), arguments, options)


def gpu_target(arch):
    """The Triton target of an architecture: 80, 90 or 100 for NVIDIA's sm_80 and so on, "gfx942" for AMD's MI300."""
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def compile_launch(launch, arch):
    """Compile a launch for an architecture, with the specialisation that Triton's JIT would choose for its arguments.

    Triton's code derives divisibility by 16, arguments equal to 1, data types and tuples from the launch's arguments.
    Launches that differ in none of these are compiled once per process.

    Returns:
        triton's CompiledKernel; `.asm["ptx"]` and `.asm["cubin"]`, or `.asm["amdgcn"]`, hold the code.
    """
    kernel, backend = launch.kernel, make_backend(gpu_target(arch))
    # as JITFunction.run sets them before binding
    options = {"debug": kernel.debug, "instrumentation_mode": ""} | launch.options
    bound, specialization, options = _binder(kernel, arch)(**launch.arguments, **options)
    key = (arch, kernel.cache_key, compute_cache_key({}, specialization, options))
    if key not in _compiled:
        options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
        source = ASTSource(kernel, signature, constexprs, attrs)
        _compiled[key] = triton.compile(source, target=gpu_target(arch), options=options.__dict__)
    return _compiled[key]


@functools.cache
def _binder(kernel, arch):
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(gpu_target(arch)))


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel on an NVIDIA GPU."""

    registers: int  # per thread
    stack: int  # bytes per thread; spilled registers go here
    local: int  # bytes per thread
    static_shared: int  # bytes per CTA
    dynamic_shared: int  # bytes per CTA
    opcodes: Counter  # SASS opcode with its modifiers, such as "LDG.E.128" -> occurrences in the code

    @property
    def shared(self):
        """Bytes of shared memory per CTA."""
        return self.static_shared + self.dynamic_shared

    def count(self, pattern):
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


@dataclass(frozen=True)
class AmdResources:
    """Resources of a kernel on an AMD GPU."""

    vgprs: int  # per lane
    sgprs: int  # per wave
    spills: int  # vector and scalar registers spilled
    private: int  # bytes of scratch per lane
    shared: int  # bytes per work group
    opcodes: Counter  # such as "v_mfma_f32_16x16x16_f16" -> occurrences in the code

    def count(self, pattern):
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def resources(compiled):
    """Read registers, memory and instruction counts of a CompiledKernel: `Resources`, or `AmdResources` for AMD."""
    if "cubin" in compiled.asm:
        return _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared)
    return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)


@functools.cache
def _nvidia_resources(cubin, dynamic_shared):
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _cuobjdump(cubin, "--dump-resource-usage")))
    # /*0a10*/   @!P0 LDG.E.128 R4, [R2.64] ;
    opcode = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return Resources(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        static_shared=int(usage["SHARED"]),
        dynamic_shared=dynamic_shared,
        opcodes=Counter(opcode.findall(_cuobjdump(cubin, "-sass"))),
    )


def _cuobjdump(cubin, option):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _amd_resources(assembly, dynamic_shared):
    def read(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))

    return AmdResources(
        vgprs=read("vgpr_count"),
        sgprs=read("sgpr_count"),
        spills=read("vgpr_spill_count") + read("sgpr_spill_count"),
        private=read("private_segment_fixed_size"),
        shared=read("group_segment_fixed_size") + dynamic_shared,
        opcodes=Counter(re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)),
    )
