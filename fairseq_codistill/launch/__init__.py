"""`codistill-launch`: starts the peers, watches them, shows and previews them. Needs neither fairseq nor torch to start."""
