"""Batches of rows that threads make ready."""

from visualglm.processing.ahead import prepared_batches


def test_batches_end_where_those_of_a_whole_run_do():
    with prepared_batches(range(10), str, 4) as batches:
        whole = list(batches)
    assert whole == [[(row, str(row)) for row in batch] for batch in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))]
    with prepared_batches(range(10), str, 4, start=5) as batches:
        assert list(batches) == [whole[1][1:], whole[2]]
    with prepared_batches(range(10), str, 4, start=10) as batches:
        assert list(batches) == []


def test_rows_are_read_no_further_than_two_batches_ahead():
    read = []
    with prepared_batches((read.append(row) or row for row in range(1000)), str, 10) as batches:
        next(batches)
    assert len(read) == 30
