"""`codistill-report`: tables and figures from fairseq's logs. Needs neither fairseq nor torch."""
