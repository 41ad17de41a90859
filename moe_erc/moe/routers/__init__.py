"""The routers, a paper a file. Adding one is a file here, a line below and a config."""

from moe_erc.moe.routers import aoe, competition, mpi, routing_free, softmax, xmoe

ROUTERS = {
    "softmax": softmax.ROUTER,
    "aoe": aoe.ROUTER,
    "competition": competition.ROUTER,
    "mpi": mpi.ROUTER,
    "routing_free": routing_free.ROUTER,
    "xmoe": xmoe.ROUTER,
}
