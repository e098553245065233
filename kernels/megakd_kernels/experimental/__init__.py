"""What has not run where it is meant for: reached by name, chosen by nothing."""
