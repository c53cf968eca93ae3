"""How the cases of the Triton kernels compile for a GPU that is not here."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any


def compile_for_sm_90(
    kernel: Any, signature: dict[str, str], constants: dict[str, int], warps: int
) -> dict[str, int]:
    """Return the registers, stack and local memory of the machine code.

    `signature` names the types of the arguments that are no constants; the constants follow them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(list(signature).index(c),): value for c, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, p in enumerate(signature) if p not in constants
        },
    )
    target = GPUTarget("cuda", 90, 32)
    code = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    words = (said.stdout + said.stderr).replace(":", " ").split()
    return {word: int(words[words.index(word) + 1]) for word in ("REG", "STACK", "LOCAL")}
