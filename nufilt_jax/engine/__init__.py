"""From a job to a merged model: plan, walk, write."""
