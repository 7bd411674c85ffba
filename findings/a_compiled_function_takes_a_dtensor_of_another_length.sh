#!/usr/bin/env bash
# torch 2.13.0: torch.compile takes a DTensor of 39 rows for one of 40, where a process has 20 of either.
#
# The guards of a compiled function look at this process's part of a DTensor, and not at the size of the whole. Sharded
# unevenly, the first of two processes has 20 of 39 rows: it runs what was compiled for 40, and gives a tensor of 40
# rows. The second one, which has 19, compiles again, and the two no longer agree. `torch.compiler.reset()` between the
# two lengths makes it right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/try.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def work(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    double = torch.compile(lambda x: x * 2, fullgraph=True, dynamic=False, backend="aot_eager")
    for rows in (40, 39):
        x = distribute_tensor(torch.ones(rows, 3), mesh, [Shard(0)])
        y = double(x)
        if rank == 0:
            print(rows, "rows:", y.shape[0])
    torch.compiler.reset()
    y = double(x)
    if rank == 0:
        print("39 rows, after a reset:", y.shape[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PY
"$dir/env/bin/python" "$dir/try.py" "$dir/store" > "$dir/found"
diff "$dir/found" - <<'TXT'
40 rows: 40
39 rows: 40
39 rows, after a reset: 39
TXT
echo "torch 2.13.0: as described"
