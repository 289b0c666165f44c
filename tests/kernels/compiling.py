"""Compiling Triton kernels for a Hopper GPU without having one.

A process of its own, because the interpreter is chosen when kernels are decorated. Reads JSON lines ``{"kernel":
"package.module:name", "signature": {...}, "constants": {...}, "warps": 4}`` and answers each with shared memory and
register spills, or with the compiler's error. ``"aligned"`` names arguments divisible by 16, which launches find out.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block can have on Hopper."""


def compile_all(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the compiler says of each kernel."""
    compiler = _compiler()
    assert compiler.stdin is not None and compiler.stdout is not None
    answers = []
    for item in kernels:
        print(json.dumps(item), file=compiler.stdin, flush=True)
        answer = compiler.stdout.readline()
        assert answer, f"the compiler's process ended at {item['kernel']}: see its messages"
        answers.append(json.loads(answer))
    return answers


def end() -> None:
    """End the compiler's process, if there is one."""
    if _compiler.cache_info().currsize:
        with _compiler() as compiler:
            compiler.kill()
        _compiler.cache_clear()


@cache
def _compiler() -> subprocess.Popen[str]:
    """One for all tests of a session, because importing takes longer than compiling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)


def compile_one(item: dict[str, Any]) -> dict[str, Any]:
    """In the process without the interpreter: through all stages, to machine code for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = item["kernel"].partition(":")
    function = getattr(importlib.import_module(module), name)
    constants = item.get("constants", {})
    signature = {argument: item["signature"].get(argument, "constexpr") for argument in function.arg_names}
    aligned = [(place,) for place, argument in enumerate(function.arg_names) if argument in item.get("aligned", ())]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": item.get("warps", 4), "num_stages": item.get("stages", 3)}
    try:
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        return {"kernel": item["kernel"], "error": f"{type(error).__name__}: {error}"[:2000]}
    size = {"shared": found.metadata.shared, "bytes": len(found.asm["cubin"])}
    return {"kernel": item["kernel"]} | size | resources(found.asm["cubin"])


def resources(binary: bytes) -> dict[str, int]:
    """Registers and bytes of stack (where registers spill to) of a thread, if CUDA's tool for it is there."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return {} if found is None else {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(compile_one(json.loads(line))), flush=True)
