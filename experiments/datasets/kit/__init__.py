"""What several data sets need; no data set is looked for here."""
