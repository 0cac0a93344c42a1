"""Generates `agent/runtimes/containerd/proto` from containerd's API module, or with --check only compares.

    python tests/conformance/generate_proto.py [--check]

The .proto files are those of the API version pinned in go.mod here. Their folders would become Python packages named
`services` and `types`, so the files are laid flat under the package they end in and their imports follow.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PACKAGE = "agent/runtimes/containerd/proto"
API = "github.com/containerd/containerd/api"
FILES = {
    "services/snapshots/v1/snapshots.proto": "snapshots.proto",
    "services/content/v1/content.proto": "content.proto",
    "services/images/v1/images.proto": "images.proto",
    "services/leases/v1/leases.proto": "leases.proto",
    "services/introspection/v1/introspection.proto": "introspection.proto",
    "services/version/v1/version.proto": "version.proto",
    "types/descriptor.proto": "descriptor.proto",
    "types/introspection.proto": "runtime.proto",
    "types/mount.proto": "mount.proto",
    "types/platform.proto": "platform.proto",
}

# Stands for google/rpc/status.proto, which the API uses in one field: the same bytes on the wire without another package.
STATUS = """syntax = "proto3";
package containerd.types;
message RpcStatus {
  int32 code = 1;
  string message = 2;
}
"""


def api_folder() -> Path:
    go = subprocess.run([HERE / "go.sh"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([go, "mod", "download", API], cwd=HERE, check=True)
    listed = subprocess.run([go, "list", "-m", "-f", "{{.Dir}}", API], cwd=HERE, check=True, capture_output=True, text=True)
    return Path(listed.stdout.strip())


def generate(into: Path) -> None:
    from grpc_tools import protoc

    api = api_folder()
    with tempfile.TemporaryDirectory() as scratch:
        flat = Path(scratch) / PACKAGE
        flat.mkdir(parents=True)
        (flat / "status.proto").write_text(STATUS)
        for source, name in FILES.items():
            text = (api / source).read_text()
            for other, other_name in FILES.items():
                text = text.replace(f'import "{other}"', f'import "{PACKAGE}/{other_name}"')
            text = text.replace('import "google/rpc/status.proto"', f'import "{PACKAGE}/status.proto"')
            text = text.replace("google.rpc.Status", "containerd.types.RpcStatus")
            (flat / name).write_text(re.sub(r"option go_package.*\n", "", text))
        well_known = Path(protoc.__file__).parent / "_proto"
        arguments = ["protoc", f"-I{scratch}", f"-I{well_known}", f"--python_out={into}", f"--pyi_out={into}"]
        if protoc.main([*arguments, *(str(path) for path in sorted(flat.iterdir()))]) != 0:
            raise SystemExit("protoc failed")
    (into / PACKAGE / "__init__.py").write_text(
        '"""Generated from containerd\'s API by tests/conformance/generate_proto.py; never edited."""\n'
    )


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {path.name: path.read_bytes() for path in (Path(scratch) / PACKAGE).iterdir()}
    target = REPOSITORY / PACKAGE
    if sys.argv[1:]:
        present = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
        if stale := sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name)):
            raise SystemExit(f"stale in {PACKAGE}: {', '.join(stale)}; run python tests/conformance/generate_proto.py")
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        if path.is_file():
            path.unlink()
    for name, data in fresh.items():
        (target / name).write_bytes(data)


if __name__ == "__main__":
    main()
