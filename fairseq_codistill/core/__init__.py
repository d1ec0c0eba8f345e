"""Codistillation with torch alone: usable in any trainer, and free of fairseq.

    losses, schedules, topology      the papers' equations
    guard                            teachers' predictions that would do harm
    output_layer, fused              distances without whole matrices of logits
    replica, int8                    frozen copies of peers' models
    group, barrier                   the ranks of one peer decide together; peers wait for each other
    codistiller                      the peers that are held, exchanged and asked
"""
