"""Make the torch that PyPI has for Linux run on a processor without its 3 GB of CUDA libraries: for tests of old versions.

    python without_cuda.py    (with the interpreter that this torch is installed for)

torch is linked against them, and an import fails if one is missing. So each gets a stand-in in torch's own folder whose
functions all answer cudaErrorNoDevice, and pip no longer counts them as required. A build without CUDA is left as it is.
"""

import re
import subprocess
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

NO_DEVICE = "mov $100, %eax\nret\n"
SITE = Path(sysconfig.get_paths()["purelib"])
LIBRARIES = SITE / "torch" / "lib"


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def labels(names: set[str]) -> str:
    return "".join(f".globl {name}\n.type {name}, @function\n{name}:\n" for name in sorted(names))


def main() -> None:
    needed: set[str] = set()
    defined: set[str] = set()
    wanted: dict[str, set[str]] = defaultdict(set)  # by symbol version
    version_of: dict[str, str] = {}  # of a library's symbols: mostly its name
    for library in LIBRARIES.glob("*.so*"):
        version_of |= dict(re.findall(r"File: (\S+) .*\n.*Name: (\S+)", output("readelf", "-VW", library)))
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", output("readelf", "-dW", library)))
        for line in output("nm", "-D", library).splitlines():
            kind, name = line.split()[-2:]
            name, _, version = name.partition("@")
            if kind == "U":
                wanted[version].add(name)
            else:
                defined.add(name)
    missing = {name for name in needed if re.match(r"lib(cu|nccl|nv)", name) and not (LIBRARIES / name).exists()}
    unversioned = {name for name in wanted[""] - defined if re.match(r"cu|nccl|nvrtc", name)}
    for name in missing:
        version = version_of.get(name, "")
        names = (wanted[version] if version else set()) | (unversioned if name.startswith("libcudart") else set())
        texts = {function for function in names if re.search(r"GetError(String|Name)", function)}
        with tempfile.TemporaryDirectory() as folder:
            source, versions = Path(folder, "stub.s"), Path(folder, "stub.map")
            code = labels(names - texts) + NO_DEVICE + labels(texts) + 'lea 0f(%rip), %rax\nret\n0: .asciz "no CUDA"\n'
            source.write_text(f'.text\n{code}.section .note.GNU-stack,"",@progbits\n')
            versions.write_text(f"{version} {{ global: *; }};\n")
            own = [f"-Wl,--version-script={versions}"] if version else []
            output("cc", "-shared", "-nostdlib", f"-Wl,-soname,{name}", *own, "-o", LIBRARIES / name, source)
    for metadata in SITE.glob("torch-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        text = re.sub(r"^Requires-Dist: (cuda|nvidia|triton).*\n", "", text, flags=re.MULTILINE)
        metadata.write_text(text, encoding="utf-8")
    print(f"stand-ins for {len(missing)} libraries")


if __name__ == "__main__":
    main()
