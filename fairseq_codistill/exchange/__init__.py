"""Weights as bytes, and how they move between peers. Knows files and stores, but no trainer.

    manifest, snapshot               what is written, checked byte by byte
    stores                           a folder (directory_store, lock_file), an object store (url_store) or memory
    structure, run, membership       may these peers teach each other; which run is it; whose index is it
    exchange                         publish and read
    worker, background               the same beside the training, in threads
    reader                         who takes part, for `codistill-launch status`
"""
