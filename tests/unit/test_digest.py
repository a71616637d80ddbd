import hashlib

import pytest

from cbqstream.digest import BackgroundDigest


@pytest.mark.parametrize("sizes", [[], [0], [5, 7], [1 << 20], [3, 3 << 20, 2, 1 << 21, 1 << 20]], ids=str)
def test_pieces_are_hashed_in_their_order(sizes):
    pieces = [bytes([position]) * size for position, size in enumerate(sizes)]
    with BackgroundDigest() as digest:
        for piece in pieces:
            digest.update(piece)
        assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_memory_may_be_used_again_after_waiting():
    buffer, whole = bytearray(1 << 21), hashlib.sha256()
    with BackgroundDigest() as digest:
        for value in range(4):
            buffer[:] = bytes([value]) * len(buffer)
            digest.update(buffer)
            digest.wait()
            whole.update(buffer)
        assert digest.hexdigest() == whole.hexdigest()


def test_an_error_elsewhere_ends_the_thread():
    digest = BackgroundDigest()

    def fail():
        with digest:
            digest.update(bytes(1 << 21))
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert digest._pool._shutdown
