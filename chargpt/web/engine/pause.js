/**
 * Returns a function that lets the thread handle the messages that have arrived. A timer would do
 * the same, but browsers delay it by milliseconds.
 * @returns {() => Promise<void>}
 */
export function makePause() {
  const { port1, port2 } = new MessageChannel();
  const waiting = [];
  port1.onmessage = () => waiting.shift()();
  return () =>
    new Promise((resolve) => {
      waiting.push(resolve);
      port2.postMessage(null);
    });
}
