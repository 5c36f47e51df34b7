/** Start the page of the one-file export: its engine computes in the page itself. */

import { LocalEngine } from "../engine/local_engine.js";
import { Page, showTrouble } from "./page.js";

LocalEngine.open()
  .then((engine) => new Page(engine).start())
  .catch(showTrouble);
