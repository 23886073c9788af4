"""Files of others and folders of ours."""
