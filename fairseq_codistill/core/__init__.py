"""Codistillation with torch alone: usable in any trainer, and free of fairseq.

    losses, schedules, weight_decay, topology
                                     the papers' equations
    guard                            teachers' predictions that would do harm
    output_layer, fused              distances without whole matrices of logits
    replica, int8                    frozen copies of peers' models
    group, barrier                   the ranks of one peer decide together; peers wait for each other
    teaching                         which peers teach in an update, and how strongly
    codistiller                      the exchange protocol of a group: rank 0 decides, all ranks follow
"""
