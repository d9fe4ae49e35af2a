"""What a run and a benchmark say: summaries, plots and the HTML report."""
