"""Where gathered weights lie: a rank's own rows stay, once, and the others' go back to the system."""

from __future__ import annotations

import errno
import mmap

import psutil
import pytest
import torch

from lorry.backends.distributed import gathered
from lorry.backends.distributed.gathered import MappedGather, WholePlace, WholePlaces, can_map

pytestmark = pytest.mark.skipif(not can_map(), reason="memory is given back page by page on Linux")


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_part_stays_and_the_others_go(rank: int, dtype: torch.dtype) -> None:
    """Also where parts begin and end within a page, of which a neighbour's values may stay."""
    rows, width = 1001, 37
    place = WholePlace(torch.Size([rows, width]), dtype, 4, rank)
    place.part.fill_(3.0)
    place.whole.view(4, rows, width)[:rank].fill_(2.0)
    place.whole.view(4, rows, width)[rank + 1 :].fill_(2.0)
    place.let_go()
    assert bool((place.part == 3.0).all())
    others = torch.cat([p for i, p in enumerate(place.whole.chunk(4)) if i != rank])
    kept = int((others != 0).sum())
    assert kept <= 2 * mmap.PAGESIZE // dtype.itemsize
    # as far as torch knows it holds no more than that
    assert place.part.untyped_storage().nbytes() == rows * width * dtype.itemsize


def test_the_system_gets_them_back() -> None:
    """Half of 256 MiB; of what else this process takes and gives meanwhile, little."""
    place = WholePlace(torch.Size([2**25]), torch.float32, 2, 1)
    place.whole.fill_(1.0)
    before = psutil.Process().memory_info().rss
    place.let_go()
    assert before - psutil.Process().memory_info().rss > 0.9 * 2**27


class WithoutHugePages(mmap.mmap):
    """Memory of a Linux that was built without huge pages."""

    def madvise(self, option: int, *where: int) -> None:
        if option == mmap.MADV_NOHUGEPAGE:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().madvise(option, *where)


def test_a_kernel_without_huge_pages_has_nothing_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "map_memory", lambda size: WithoutHugePages(-1, size))
    place = WholePlace(torch.Size([4096]), torch.float32, 2, 1)
    place.whole.fill_(1.0)
    place.let_go()
    assert bool((place.part == 1.0).all())


def test_a_share_is_laid_where_it_belongs() -> None:
    """Of five rows over two ranks the second has two, and room for one more."""
    share = torch.arange(8.0).view(2, 4)
    laid = WholePlaces(ranks=2, rank=1).lay(share, 3)
    assert torch.equal(laid, share)
    assert laid.data_ptr() != share.data_ptr()
    assert laid.untyped_storage().nbytes() == 3 * 4 * 4


def test_memory_that_is_kept_is_used_again() -> None:
    """And one that is not is another one each time."""
    cpu = torch.device("cpu")
    keeping, fresh = MappedGather(keep=True), MappedGather(keep=False)
    first = keeping.allocate((3000,), dtype=torch.float32, device=cpu)
    second = keeping.allocate((10,), dtype=torch.bfloat16, device=cpu)
    assert second.data_ptr() == first.data_ptr()
    held = [fresh.allocate((10,), dtype=torch.float32, device=cpu) for _ in range(2)]
    assert held[0].data_ptr() != held[1].data_ptr()
