// Reads a JSON list of simulations (iam-simulate's own shape) from stdin, and writes what each came to as a JSON list.
// A context key that does not belong to the action and its resource is an error: the case would test nothing.
import { text } from 'node:stream/consumers'
import { runSimulation } from '@cloud-copilot/iam-simulate'

const results = []
for (const simulation of JSON.parse(await text(process.stdin))) {
  const answer = await runSimulation(simulation, { simulationMode: 'Strict' })
  if (answer.resultType === 'error') {
    results.push({ error: JSON.stringify(answer.errors) })
    continue
  }
  const ignored = (answer.result ? [answer.result] : answer.results).flatMap((one) => one.ignoredContextKeys ?? [])
  results.push(ignored.length ? { error: `context keys of no meaning here: ${ignored}` } : { result: answer.overallResult })
}
process.stdout.write(JSON.stringify(results))
