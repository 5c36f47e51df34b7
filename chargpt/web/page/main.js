// The page: a prompt, a button and the text.

import { LocalEngine } from "../engine/local_engine.js";
import { Tokenizer } from "../engine/tokenizer.js";

const engine = await LocalEngine.open();
const tokenizer = new Tokenizer(engine.facts.characters, engine.facts.end_of_text_id);
const text = document.getElementById("text");
const settings = { temperature: 0.8, topK: 0, topP: 1, minP: 0, seed: 1337 };
document.getElementById("go").onclick = async () => {
  const { ids } = tokenizer.encode(document.getElementById("prompt").value);
  text.textContent = tokenizer.decode(ids);
  const onRecords = (records) => (text.textContent += tokenizer.decode(records.map(({ id }) => id)));
  await engine.write({ ids, from: ids.length, n: 500, settings, onRecords });
};
