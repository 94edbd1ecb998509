"""``python -m services.instance.rank``: one of an instance's further ranks. Started by its leader, see ``ranks``."""

from services.runtime.process import leave, loading

if __name__ == "__main__":
    with loading():
        from services.instance import torch_parts

        torch_parts.sharded_tensors = True
        from services.instance.ranks.process import main
    leave(main())
