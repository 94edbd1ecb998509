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


def test_a_block_goes_from_daemon_to_daemon_and_home():
    table = table_of(4)
    for index in range(3):
        assert table.move_to_remote(index, BlockRef("a", handle(index)), 5) is None
    a = table.segments["a"]
    a.sent = 3
    assert table.move_to_remote(1, BlockRef("b", handle(11)), 6) is None
    assert a.blocks.rows.tolist() == [[0, 1, 0], [2, 1, 128]]
    assert a.sent == 1, "what came after the block is told anew"
    assert table.segments["b"].blocks.rows.tolist() == [[11, 1, 64]]
    assert table.entries[1].remote == BlockRef("b", handle(11))
    a.sent = 2
    assert table.move_to_local(2, handle(50)) is None
    assert a.sent == 1
    assert table.local_blocks.tolist() == [[50, 128], [103, 192]]
    assert table.slot(128) == 50 * 64
    assert (table.entries[2].remote, table.entries[2].home) == (None, Home.SEALED)


def test_a_segment_without_blocks_is_gone_and_a_new_one_has_a_new_handle():
    table = table_of(2)
    table.move_to_remote(0, BlockRef("a", handle(7)), 5)
    emptied = table.move_to_local(0, handle(60))
    assert emptied is not None
    assert (emptied.kvdaemon_id, emptied.handle) == ("a", 5)
    assert table.segments == {}
    table.move_to_remote(0, BlockRef("a", handle(8)), 9)
    assert (table.segments["a"].handle, table.segments["a"].sent) == (9, 0)
