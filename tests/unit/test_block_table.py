from services.core.blocks import BlockHandle, BlockRef
from services.rmanager.block_table import BlockTable, Home


def handle(block: int) -> BlockHandle:
    return BlockHandle(block, 1)


def table_of(count: int) -> BlockTable:
    table = BlockTable(64)
    for block in range(count):
        table.append_local(handle(100 + block), Home.WORKSPACE)
    return table


def test_local_blocks_come_with_their_positions():
    table = table_of(3)
    assert table.local_blocks.tolist() == [[100, 0], [101, 64], [102, 128]]
    assert table.slot(130) == 102 * 64 + 2


def test_a_shipped_block_leaves_the_local_list_and_joins_a_segment():
    table = table_of(4)
    table.move_to_remote(1, BlockRef("far", handle(7)), segment_handle=5)
    assert table.local_blocks.tolist() == [[100, 0], [102, 128], [103, 192]]
    assert table.segments["far"].handle == 5
    assert table.segments["far"].blocks.rows.tolist() == [[7, 1, 64]]
    assert table.blocks_on("far") == 1
    assert table.blocks_on("nowhere") == 0


def test_a_segment_stays_ascending_and_is_sent_anew_from_an_earlier_block():
    table = table_of(4)
    table.move_to_remote(2, BlockRef("far", handle(9)), 5)
    segment = table.segments["far"]
    segment.sent = segment.blocks.count
    table.move_to_remote(3, BlockRef("far", handle(8)), 6)
    assert segment.sent == 1, "a later block is simply appended"
    segment.sent = 2
    table.move_to_remote(0, BlockRef("far", handle(7)), 6)
    assert segment.blocks.rows.tolist() == [[7, 1, 0], [9, 1, 128], [8, 1, 192]]
    assert segment.sent == 0, "the daemon's list must be told anew from where it changed"
    assert segment.handle == 5


def test_an_adopted_block_replaces_the_own_one_in_place():
    table = table_of(3)
    table.replace_local(1, handle(55))
    assert table.local_blocks.tolist() == [[100, 0], [55, 64], [102, 128]]
    assert table.entries[1].local == handle(55)


def test_lists_grow_beyond_their_first_size():
    table = table_of(100)
    for index in range(0, 100, 2):
        table.move_to_remote(index, BlockRef("far", handle(index)), 1)
    assert len(table.local_blocks) == 50
    assert table.segments["far"].blocks.rows[:, 2].tolist() == [index * 64 for index in range(0, 100, 2)]
