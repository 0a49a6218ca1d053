"""The names of a request's blocks, whoever computed them and wherever they are. `manager.py` is the only caller."""

from zif.contract import KVSpec, Request
from zif.kv.encoded import EncodedBlocks
from zif.kv.hashing import PrefixChain


def block_names(request: Request, spec: KVSpec) -> list[bytes]:
    """Return the digests of all full blocks of one group that hold what the known tokens of a request gave."""
    if spec.counts_encoder_tokens:
        encoded = EncodedBlocks(request, spec)
        return [encoded.digest(block) for block in range(encoded.num_blocks)]
    num_blocks = request.num_tokens // spec.block_size
    chain = PrefixChain(request, spec.block_size)
    chain.extend(num_blocks)
    return chain.digests(0, num_blocks)
