-- The same small upload again and again, for wrk: given the content type, and a file with the body.
-- One request is made beforehand and sent as it is, so that wrk costs next to nothing.

function init(args)
   local file = assert(io.open(args[2], "rb"))
   wrk.method = "POST"
   wrk.headers["Content-Type"] = args[1]
   wrk.body = file:read("*a")
   file:close()
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "seconds": %.6f, "p50": %.3f, "p99": %.3f, "failed": %d}\n',
      summary.requests, summary.duration / 1e6,
      latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
